"""What JAX tells of its compiling (`jax.monitoring`): how long it took, what the cache had."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

STAGES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",  # or loading it from the cache
)
ASKED = "/jax/compilation_cache/compile_requests_use_cache"
FOUND = "/jax/compilation_cache/cache_hits"


class CompileEvents:
    """Counts within `listening`.

    Attributes:
        hits, misses: programs that the persistent cache had and had not, whichever thread
            asked; both stay 0 where it is off.
    """

    def __init__(
        self, took: Callable[[float], None], now: Callable[[], float] = time.monotonic
    ):
        """Args: took: is told the seconds that this thread, no other, spent on compiling."""
        self._took, self._now, self._thread = took, now, threading.get_ident()
        self._told: list[tuple[float, float]] = []  # when a stage began, how long it took
        self._asked = self.hits = 0

    @property
    def misses(self) -> int:
        return self._asked - self.hits

    @contextmanager
    def listening(self) -> Iterator[None]:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        try:
            yield
        finally:
            # JAX asserts that it knows them; whoever clears all listeners clears these, too.
            with suppress(AssertionError, ValueError):
                jax.monitoring.unregister_event_duration_listener(self._on_duration)
            with suppress(AssertionError, ValueError):
                jax.monitoring.unregister_event_listener(self._on_event)

    def _on_event(self, event: str, **_: str | int) -> None:
        settings: Any = jax.config
        if settings.jax_compilation_cache_dir:  # without, JAX asks all the same
            self._asked += event == ASKED
            self.hits += event == FOUND

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event not in STAGES or threading.get_ident() != self._thread:
            return
        began, inside = self._now() - duration_secs, 0.0
        # A function is traced within the one that calls it, and told first.
        while self._told and self._told[-1][0] >= began:
            inside += self._told.pop()[1]
        self._told.append((began, duration_secs))
        self._took(max(0.0, duration_secs - inside))
