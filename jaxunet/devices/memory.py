"""The most memory that was in use: on the devices, where they tell, and of this process."""

import resource
import sys
from collections.abc import Iterable

import jax


def peak_memory(devices: Iterable[jax.Device]) -> dict[str, int | None]:
    """Peak bytes since the process started.

    Returns:
        `device_bytes`, JAX's on that of `devices` where it was most; None where none of them
        tells, as a CPU doesn't. `process_bytes`, resident in this process, with all that the
        host holds beside the arrays; on a CPU the devices' memory is part of it.
    """
    stats = (device.memory_stats() or {} for device in devices)
    peaks = [peak for each in stats if (peak := each.get("peak_bytes_in_use")) is not None]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "device_bytes": max(peaks, default=None),
        "process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
