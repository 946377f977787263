"""What libtpu, a TPU's driver and compiler, asks of the environment where there is no TPU."""

import os
from pathlib import Path

ANSWERS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What it would ask of Google's cloud, and wait for. The last: it takes one process at a time,
as a TPU does, but compiling alone needs none."""
_EVERYWHERE = {"TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY"}
"""What JAX and libtpu themselves set without a TPU."""


def answer() -> None:
    """Set what is unset of `ANSWERS`."""
    for variable, value in ANSWERS.items():
        os.environ.setdefault(variable, value)


def answer_if_absent(devices: Path = Path("/dev")) -> None:
    """The same on a machine that shows no TPU: else libtpu, where it is installed, alarms.

    JAX asks it first, and goes on with the CPU either way. Where the environment or `devices`
    speak of a TPU, all is left to libtpu.
    """
    told = any(name.startswith("TPU_") for name in os.environ.keys() - _EVERYWHERE)
    seen = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    if not (told or seen):
        answer()
