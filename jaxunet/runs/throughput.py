"""How fast a run trains and what memory it takes, for its log lines."""

import time

import jax

from jaxunet.devices.memory import peak_memory


class Throughput:
    """Counts the examples that were trained on since the last log line, and the time."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count anew: an epoch begins, and what lay before it, as an evaluation, is none."""
        self._since, self._examples = time.perf_counter(), 0.0

    def add(self, examples: float) -> None:
        """A step on so many examples is finished."""
        self._examples += examples

    def measured(self) -> dict[str, float]:
        """What to log now; counts anew.

        Returns:
            `examples_per_second` of all devices, since the last line or the epoch's begin,
            with waiting for data and for checkpoints; `peak_process_bytes` and, where the
            devices tell it, `peak_device_bytes`, see `jaxunet.devices.memory`.
        """
        seconds = time.perf_counter() - self._since
        memory = peak_memory(jax.local_devices())
        found = {
            "examples_per_second": self._examples / seconds if seconds > 0 else None,
            "peak_device_bytes": memory["device_bytes"],
            "peak_process_bytes": memory["process_bytes"],
        }
        self.begin()
        return {name: value for name, value in found.items() if value is not None}
