import errno
import io
import os
import sys
import termios
import threading
from select import select

import pytest

from jaxunet import bars
from jaxunet.bars import Bar, say


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bars, "time", clock)
    return clock


def count_to(total, clock, seconds):
    """Count `total` things that take `seconds` each."""
    for number in Bar("epoch 1/4", total, range(total)):
        assert number < total
        clock.now += seconds


def test_where_no_terminal_is_a_plain_line_comes_at_most_every_30_seconds(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    count_to(100, clock, 0.29)  # all within 30 seconds
    assert sys.stderr.getvalue() == ""
    count_to(100, clock, 1.0)
    assert sys.stderr.getvalue() == "".join(
        f"epoch 1/4: {done} of 100\n" for done in (30, 60, 90)
    )


def test_a_plain_line_holds_the_latest_note_and_counts_from_where_it_began(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Bar("epoch 2/4", 50, initial=20) as bar:
        bar.update()
        bar.note("loss=0.5")
        clock.now += 31
        bar.update(2)
    assert sys.stderr.getvalue() == "epoch 2/4: 23 of 50, loss=0.5\n"


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        with Bar("epoch 1/4", 2) as bar:
            bar.update()
            say("a line of its own")
        shown = ""
        while "its own\r\n" not in shown and select([ours], [], [], 10)[0]:
            shown += os.read(ours, 100_000).decode()  # a terminal hands on part by part
    os.close(ours)
    assert "epoch 1/4:   0%|" in shown
    assert "\ra line of its own\r\n" in shown
    assert "of 2" not in shown


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stderr", [None, Full()])
def test_progress_that_cannot_be_shown_ends_nothing(stderr, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    count_to(100, clock, 31.0)


def test_nothing_is_shown_unasked_for(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in Bar("read", 3, range(3), show=False):
        clock.now += 60
    assert sys.stderr.getvalue() == ""


def test_a_bar_starts_no_process():
    # tqdm's own lock does: it lies in shared memory, and its keeper dies of a SIGHUP.
    assert isinstance(bars._Tqdm.get_lock(), type(threading.RLock()))
