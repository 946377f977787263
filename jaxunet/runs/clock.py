"""Where a run's time goes, and when it ends.

At every moment one row is under way, so that the rows of `Clock` together are the wall time of
the processes that made the run:

    start         from the start of the process to the first step, with preparing data
    compilation   tracing, lowering, compiling or loading from the cache, whenever it happened.
                  While other threads compile, what the loop does meanwhile (reading data) is
                  counted, and only waiting for them is compilation
    data          the devices had nothing to do, and the loop waited for a batch
    steps         the rest of the loop: steps run while the loop dispatches the next ones,
                  waits for their losses, and reads
    evaluation    of the validation split, with reading it
    checkpoints   what the loop waited for: fetching the state, and what is not written beside
                  the next steps
    figures       summary.json with its intervals, the model card, the pictures
    lost          what a process that was killed did after its last checkpoint, as far as its
                  last line of metrics.jsonl; with its start, if it never came to save
    undivided     training and evaluation by a version that did not tell them apart

Not known to the next process is what one did after its last line, or, if it was stopped or had
finished, after its last checkpoint was taken: writing that, and figures.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from jaxunet.devices.compile_events import CompileEvents
from jaxunet.devices.idle import Idle

ROWS = {
    "start": "start",
    "compilation": "compilation",
    "data": "waiting for data",
    "steps": "steps",
    "evaluation": "evaluation",
    "checkpoints": "checkpoints",
    "figures": "figures",
    "lost": "lost since a checkpoint",
    "undivided": "by an earlier version",
}
"""What each row is called on the terminal."""

RECENT_STEPS = 100


class Clock:
    """Seconds by row; within `compiling`, what JAX compiles in this thread has its own."""

    def __init__(
        self, started: float | None = None, now: Callable[[], float] | None = None
    ) -> None:
        """Args: started: when `start` began, by `now` (none: `time.monotonic`)."""
        self.now = now or time.monotonic
        self.started = self.now() if started is None else started
        self._row, self._since = "start", self.started
        self._seconds = dict.fromkeys(ROWS, 0.0)
        self._cache = {"hits": 0, "misses": 0}  # of the processes before
        self._events = CompileEvents(lambda s: self.move(s, "compilation"), self.now)

    def compiling(self) -> AbstractContextManager[None]:
        """Within, JAX is listened to."""
        return self._events.listening()

    def add(
        self, record: Mapping[str, Any], *, undivided: float = 0.0, lost: float = 0.0
    ) -> None:
        """Count what the processes before this one took.

        Args:
            record: as `record` gave it; empty where there is none.
            undivided: seconds that stand for it then.
            lost: seconds since the last checkpoint, of all of them.
        """
        for row, seconds in record.get("seconds", {"undivided": undivided}).items():
            self._seconds[row] = self._seconds.get(row, 0.0) + seconds
        for kind, count in record.get("cache", {}).items():
            self._cache[kind] += count
        self._seconds["lost"] = lost

    def turn(self, row: str) -> str:
        """From now on, time is `row`'s; which was under way until now."""
        before, at = self._row, self.now()
        self._seconds[before] += at - self._since
        self._row, self._since = row, at
        return before

    @contextmanager
    def span(self, row: str) -> Iterator[None]:
        """Within, time is `row`'s."""
        before = self.turn(row)
        try:
            yield
        finally:
            self.turn(before)

    @contextmanager
    def waiting_for_data(self, idle: Idle) -> Iterator[None]:
        """Within, a batch is awaited: what the devices are `idle` meanwhile is its row's."""
        began = self.now()
        yield
        self.move(idle.seconds(began), "data")

    def move(self, seconds: float, row: str) -> None:
        """`seconds` of the row under way were `row`'s."""
        self._seconds[self._row] -= seconds
        self._seconds[row] += seconds

    def seconds(self, *rows: str) -> float:
        """Of these rows together up to now; of all, if none is given."""
        self.turn(self._row)
        return sum(self._seconds[row] for row in rows or self._seconds)

    def record(self) -> dict[str, Any]:
        """`seconds` by row, their sum, and what the compilation `cache` had: JSON."""
        total = self.seconds()
        seconds = {row: round(spent, 3) for row, spent in self._seconds.items() if spent}
        events = {"hits": self._events.hits, "misses": self._events.misses}
        cache = {kind: count + events[kind] for kind, count in self._cache.items()}
        return {"total_seconds": round(total, 3), "seconds": seconds, "cache": cache}


def in_words(record: Mapping[str, Any]) -> str:
    """A line of what `Clock.record` gave."""
    parts = {row: f"{ROWS.get(row, row)} {duration(s)}" for row, s in record["seconds"].items()}
    if "compilation" in parts:
        hits, misses = (record["cache"][kind] for kind in ("hits", "misses"))
        parts["compilation"] += f" (cache: {hits} hits, {misses} misses)"
    return f"{duration(record['total_seconds'])}: {', '.join(parts.values())}"


def duration(seconds: float) -> str:
    """The two largest units of it."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    left = round(seconds)
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min {left % 60:02} s"
    left = round(seconds / 60)
    if left < 24 * 60:
        return f"{left // 60} h {left % 60:02} min"
    return f"{left // (24 * 60)} d {left // 60 % 24:02} h"


class Pace:
    """When a run ends, by what this process did last: earlier ones count for nothing."""

    def __init__(self, spent: float = 0.0) -> None:
        """Args: spent: seconds of evaluations and checkpoints before this process."""
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._between: float | None = None
        self._spent = spent

    def step(self, spent: float) -> None:
        """A step is done; `spent`: seconds of steps and of waiting for data so far."""
        self._steps.append(spent)

    def epoch(self, spent: float) -> None:
        """An epoch is over; `spent`: seconds of all evaluations and checkpoints so far."""
        self._between, self._spent = spent - self._spent, spent

    def left(self, steps: int, epochs: int) -> str:
        """How long so many steps, and the ends of so many epochs, take: in words.

        Nothing before two steps are done, and nothing for none. The first step is not counted,
        for what the devices and the readers do once. As long as no epoch has ended, "or more".
        """
        count = len(self._steps) - 1
        if count < 1 or not epochs:
            return ""
        each = (self._steps[-1] - self._steps[0]) / count
        if self._between is None:
            return f"run ends in {duration(steps * each)} or more"
        return f"run ends in {duration(steps * each + epochs * self._between)}"
