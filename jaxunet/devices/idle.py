"""Since when the devices have had nothing to do, known without waiting for them."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import jax


class Idle:
    """A thread waits for what was dispatched last, in the place of the loop that goes on."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._since = now, now()
        self._dispatched = self._done = 0
        self._results: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def dispatched(self, results: Any) -> None:
        """Work was given to the devices, of which arrays `results` come."""
        self._dispatched += 1
        self._results.put(results)

    def seconds(self, since: float) -> float:
        """How long they have been idle now, counted from `since` at the earliest."""
        if self._done < self._dispatched:
            return 0.0
        return max(0.0, self._now() - max(since, self._since))

    def close(self) -> None:
        self._results.put(None)
        self._thread.join(5.0)  # not for ever: another process may have left a sum hanging

    def _watch(self) -> None:
        while (results := self._results.get()) is not None:
            # Whoever fetches them is told of what went wrong.
            with suppress(Exception):
                jax.block_until_ready(results)
            self._since = self._now()
            self._done += 1
