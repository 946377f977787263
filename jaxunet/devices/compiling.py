"""Programs compiled before they are first called, where it helps several at a time."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import jax

from jaxunet.bars import note

SILENT_SECONDS = 3.0
"""What takes longer to compile is announced."""


class Compilation:
    """Steps that are being compiled, in threads.

    JAX keeps what comes of it: a step that is called later, with arguments of the shapes and in
    the places that it was lowered for, finds its program there.
    """

    def __init__(self, title: str, lowered: Sequence[jax.stages.Lowered], *, show: bool = True):
        """Args: title: what they are called. show: False to say nothing of it."""
        self._title, self._show, self._start = title, show, time.perf_counter()
        # The compiler lets go of the interpreter, so that the threads, and whatever is done
        # meanwhile, run at the same time. A CPU's takes all cores by itself, and memory: two at
        # once had a peak 5% higher.
        on_cpu = jax.devices()[0].platform == "cpu"
        pool = ThreadPoolExecutor(1 if on_cpu else max(1, len(lowered)))
        self._programs = [pool.submit(self._compile, each) for each in lowered]
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
