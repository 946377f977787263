"""Programs compiled before they are first called, where it helps several at a time."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax

from jaxunet.bars import note

SILENT_SECONDS = 3.0
"""What takes longer to compile is announced."""


def pays() -> bool:
    """Whether to compile before the first call: on a GPU, whose search takes long.

    With several processes each knows its own part of a batch only.
    """
    settings: Any = jax.config
    on_gpu = jax.devices()[0].platform == "gpu"
    return on_gpu and jax.process_count() == 1 and not settings.jax_disable_jit


class Compilation:
    """Steps that are being compiled, in threads, where that pays.

    JAX keeps what comes of it: a step that is called later, with arguments of the shapes and in
    the places that it was lowered for, finds its program there.
    """

    def __init__(self, title: str, *lower: Callable[[], jax.stages.Lowered], show: bool = True):
        """Begin.

        Args:
            title: what the steps are called.
            lower: gives each of them, lowered.
            show: False to say nothing of it.
        """
        self._title, self._show, self._start = title, show, time.perf_counter()
        pool = ThreadPoolExecutor(len(lower))
        # The compiler lets go of the interpreter, so that the threads, and whatever is done
        # meanwhile, run at the same time.
        self._programs = [
            pool.submit(self._compile, each()) for each in (lower if pays() else ())
        ]
        pool.shutdown(wait=False)

    def _compile(self, lowered: jax.stages.Lowered) -> float:
        lowered.compile()
        return time.perf_counter() - self._start

    def finish(self) -> None:
        """Wait for all, and say how long they took; raises what the compiler raised."""
        if self._programs and self._show:
            if wait(self._programs, SILENT_SECONDS).not_done:
                note(f"compiling {self._title}")
            seconds = max(program.result() for program in self._programs)
            note(f"compiled {self._title} in {seconds:.1f} s")
        for program in self._programs:
            program.result()
