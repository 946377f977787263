"""SIGTERM and Ctrl-C: a run finishes its step, saves and says how to go on."""

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunet.distributed import is_joined
from jaxunet.parallel import Strategy
from jaxunet.steps import AXIS

VOTES_IN_FLIGHT = 2  # counted so many later, so that no step waits for a vote


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives SIGTERM or SIGINT; a second one kills at once, as usual."""
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
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

    def __init__(self, strategy: Strategy, received: list[int]):
        """Args: received: filled by `stop_requests`."""
        self._strategy, self._received = strategy, received
        self._cast: deque[Any] = deque()
        self._agreed = 0
        self._step = strategy.compile(_highest, outputs="replicated")

    def __call__(self) -> int:
        """The number of the signal to stop for, or 0; all processes must call alike."""
        if self._agreed:
            return self._agreed
        mine = self._received[0] if self._received else 0
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
