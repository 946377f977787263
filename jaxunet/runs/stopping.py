"""Signals that ask a run to stop: it finishes its step, saves and says how to go on."""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunet.devices.distributed import is_joined
from jaxunet.devices.strategies import Strategy
from jaxunet.errors import Stopped
from jaxunet.learning.steps import AXIS

TIME_IS_UP = 128
"""Stands among the signals' numbers, which are lower, for a time limit of the run's own."""

VOTES_IN_FLIGHT = 2  # counted so many later, so that no step waits for a vote

STOP_SIGNALS = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # from schedulers, and what `kill` sends
    signal.SIGHUP,  # the terminal was closed
    signal.SIGUSR1,  # Slurm's warning before the time is up (`--signal=USR1@60`)
)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives the first of `STOP_SIGNALS`; a second one kills at once, as usual.

    One that is ignored, as SIGHUP is under `nohup`, stays ignored; but for SIGINT, which
    shells ignore in every job that they start in the background. Only the main thread can
    take signals: in another one the list stays empty, and a line says so.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        print(
            "training in a thread: a signal ends it without saving; --resume goes on from "
            "the last checkpoint",
            file=sys.stderr,
        )
        yield received
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {
        number: handler
        for number in STOP_SIGNALS
        if (handler := signal.getsignal(number)) is not None  # not from Python: left alone
        and (handler != signal.SIG_IGN or number == signal.SIGINT)
    }
    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopVote:
    """Whether to stop, decided by all processes at the same call, whichever was asked.

    With several processes every call costs one tiny sum over the devices, which is only
    looked at `VOTES_IN_FLIGHT` calls later.
    """

    def __init__(self, strategy: Strategy, received: list[int], deadline: float | None = None):
        """Args: received: filled by `stop_requests`. deadline: of `time.monotonic`."""
        self._strategy, self._received, self._deadline = strategy, received, deadline
        self._cast: deque[Any] = deque()
        self._agreed = 0
        self._step = strategy.compile(_highest, outputs="replicated")

    def __call__(self) -> int:
        """The signal to stop for, `TIME_IS_UP`, or 0; all processes must call alike."""
        if self._agreed:
            return self._agreed
        mine = self._received[0] if self._received else 0
        if not mine and self._deadline is not None and time.monotonic() >= self._deadline:
            mine = TIME_IS_UP
        if not is_joined():
            self._agreed = mine
            return mine
        ballots = np.full(jax.local_device_count(), mine, np.int32)
        self._cast.append(self._step((), self._strategy.split(ballots)))
        if len(self._cast) > VOTES_IN_FLIGHT:
            self._agreed = int(self._strategy.fetch(self._cast.popleft()))
        return self._agreed


def _highest(_: tuple[()], ballots: jax.Array) -> jax.Array:
    return jax.lax.pmax(jnp.max(ballots), AXIS)


def stopped(number: int, step: int, total_steps: int, run: Path) -> Stopped:
    """The error that ends a run which `StopVote` stopped and which is saved."""
    timed = number == TIME_IS_UP
    by = "its time limit" if timed else signal.Signals(number).name
    return Stopped(
        f"Stopped by {by} after step {step} of {total_steps}, which is saved. Go on with the "
        f"same command and --resume --out {run}.",
        None if timed else number,
    )
