"""A run's log followed from a thread, as a notebook draws its curve."""

import json
import threading

import pytest

from jaxunet.runs.canvas import with_own_settings
from jaxunet.runs.following import follow

SOON = 30.0  # seconds after which a thread is taken for stuck


def write(run, step):
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": step}) + "\n")


def test_lines_are_drawn_while_the_block_runs_and_all_of_them_at_its_end(tmp_path):
    drawn, one = [], threading.Event()

    def draw(lines):
        drawn.append([line["step"] for line in lines])
        one.set()

    with follow(tmp_path, draw, every=0.01):
        write(tmp_path, 10)
        assert one.wait(SOON)
        assert drawn == [[10]]
        write(tmp_path, 20)
    assert drawn[-1] == [10, 20]
    assert len(drawn) == 2  # nothing new, nothing drawn


def test_what_drawing_raised_is_raised_when_the_block_is_through(tmp_path):
    called = threading.Event()

    def draw(lines):
        called.set()
        raise OSError("no room for the figure")

    through = []

    def train():
        with follow(tmp_path, draw, every=0.01):
            write(tmp_path, 10)
            assert called.wait(SOON)
            through.append(True)

    with pytest.raises(OSError, match="no room"):
        train()
    assert through


def test_an_error_of_the_block_is_the_one_that_is_raised(tmp_path):
    def draw(lines):
        raise OSError("no room for the figure")

    def train():
        with follow(tmp_path, draw, every=0.01):
            write(tmp_path, 10)
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert "follow" not in [thread.name for thread in threading.enumerate()]


def test_figures_of_two_threads_are_drawn_one_after_the_other():
    order, entered, leave = [], threading.Event(), threading.Event()

    @with_own_settings
    def slow():
        entered.set()
        leave.wait(SOON)
        order.append("slow")

    @with_own_settings
    def quick():
        order.append("quick")

    first, second = threading.Thread(target=slow), threading.Thread(target=quick)
    first.start()
    assert entered.wait(SOON)
    second.start()
    second.join(0.1)  # where it is not held back, it is through long before
    leave.set()
    first.join(SOON)
    second.join(SOON)
    assert order == ["slow", "quick"]
