"""How far a long job is, on stderr: a bar on a terminal, now and then a plain line elsewhere.

Nothing here is worth a run: where stderr is closed or takes no more, nothing is shown.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS = 30.0  # between plain lines


class _Tqdm(tqdm):
    # By default a lock between processes: files in /dev/shm and a process to watch them.
    _lock = threading.RLock()


def on_terminal() -> bool:
    """Whether somebody watches stderr, so that a line may be written over."""
    return sys.stderr is not None and sys.stderr.isatty()


class Bar(Generic[Item]):
    """Counts to `total`: by `update` within a `with`, or by iterating over `items`."""

    def __init__(
        self,
        title: str,
        total: int,
        items: Iterable[Item] = (),
        *,
        initial: int = 0,
        unit: str = "it",
        leave: bool = False,
        show: bool = True,
    ):
        """Args: leave: keep the full bar on the terminal. show: False for nothing at all."""
        self._title, self._total, self._items, self._done = title, total, items, initial
        self._stream = sys.stderr if show and not on_terminal() else None
        self._last, self._note = time.monotonic(), ""
        self._bar = _Tqdm(
            desc=title,
            total=total,
            initial=initial,
            unit=unit,
            leave=leave,
            disable=not (show and on_terminal()),
        )

    def __enter__(self) -> "Bar[Item]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def note(self, text: str) -> None:
        """What to show beside the count from the next update on."""
        self._note = f", {text}"
        self._bar.set_postfix_str(text, refresh=False)

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        self._bar.update(count)
        if self._stream is not None and time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            try:
                print(
                    f"{self._title}: {self._done} of {self._total}{self._note}",
                    file=self._stream,
                    flush=True,
                )
            except OSError:  # a pipe that nobody reads, a disk that is full
                self._stream = None


def note(text: str) -> None:
    """Print a line on stderr, if it takes one."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line on stdout without breaking a bar on the same terminal."""
    with _Tqdm.external_write_mode(nolock=False):
        print(text, flush=True)
