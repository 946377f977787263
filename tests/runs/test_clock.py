"""Where the time goes and when a run ends, by a clock that a test sets."""

import os
import threading

import jax
import numpy as np
import pytest

from jaxunet.devices.compile_events import STAGES, CompileEvents
from jaxunet.devices.idle import Idle
from jaxunet.runs.clock import Clock, Pace, duration, in_words


class Time:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def time():
    return Time()


def test_every_second_belongs_to_one_row(time):
    clock = Clock(started=48.0, now=time)
    time.passes(3)
    clock.turn("steps")
    time.passes(10)
    clock.move(4, "data")
    with clock.span("evaluation"):
        time.passes(20)
        with clock.span("checkpoints"):
            time.passes(1)
        time.passes(2)
    time.passes(5)
    found = clock.record()
    assert found["total_seconds"] == 43
    assert found["seconds"] == {
        "start": 5,
        "data": 4,
        "steps": 11,
        "evaluation": 22,
        "checkpoints": 1,
    }
    assert clock.seconds("steps", "data") == 15


def test_a_resumed_clock_counts_what_was_before(time):
    first = Clock(now=time)
    time.passes(2)
    saved = first.record()
    second = Clock(now=time)
    second.add(saved, undivided=9, lost=7)
    time.passes(4)
    found = second.record()
    assert found["seconds"] == {"start": 6, "lost": 7}
    third = Clock(now=time)
    third.add(found, undivided=9, lost=8)  # what is lost is told anew, in all
    assert third.record()["seconds"] == {"start": 6, "lost": 8}

    of_before = Clock(now=time)
    of_before.add({}, undivided=9, lost=0)
    assert of_before.record()["seconds"] == {"undivided": 9}


def test_compiling_is_taken_out_of_the_row_under_way_and_counted_once(time):
    tracing, _, compiling = STAGES
    clock = Clock(now=time)
    clock.turn("steps")
    with clock.compiling():
        time.passes(3)
        jax.monitoring.record_event_duration_secs(tracing, 1)  # from 52 to 53,
        time.passes(1)
        jax.monitoring.record_event_duration_secs(tracing, 3)  # within 51 to 54
        time.passes(2)
        jax.monitoring.record_event_duration_secs(compiling, 2)
        jax.monitoring.record_event_duration_secs("/another", 1)
        elsewhere = threading.Thread(
            target=jax.monitoring.record_event_duration_secs, args=(compiling, 5)
        )
        elsewhere.start()  # beside what this thread does
        elsewhere.join()
    jax.monitoring.record_event_duration_secs(compiling, 2)
    assert clock.record()["seconds"] == {"steps": 1, "compilation": 5}


def test_a_program_that_the_cache_has_is_a_hit():
    assert os.environ["JAX_COMPILATION_CACHE_DIR"]
    took = []
    events = CompileEvents(took.append)
    with events.listening():
        for hits in (0, 1):
            function = jax.jit(lambda x: x * 8.0625 + 0.0625)
            function.lower(np.ones(3, np.float32)).compile()
            assert (events.hits, events.misses) == (hits, 1)
    assert min(took) >= 0
    assert sum(took) > 0


class Result:
    """What comes of a step, for JAX: ready when a test says so."""

    def __init__(self):
        self.event = threading.Event()

    def block_until_ready(self):
        self.event.wait(10)
        return self


def test_devices_are_idle_from_the_end_of_what_was_dispatched_last(time):
    idle, result = Idle(time), Result()
    time.passes(3)
    assert idle.seconds(since=0) == 3
    assert idle.seconds(since=52) == 1
    idle.dispatched([result])
    time.passes(4)
    assert idle.seconds(since=0) == 0
    result.event.set()
    idle.close()  # once the thread has seen it
    time.passes(2)
    assert idle.seconds(since=0) == 2


def test_the_end_of_a_run_follows_from_the_latest_steps_and_evaluation():
    pace = Pace(1000.0)  # of processes before
    assert pace.left(steps=300, epochs=3) == ""
    pace.step(500.0)
    assert pace.left(steps=299, epochs=3) == ""
    for number in range(1, 11):
        pace.step(500.0 + number)
    assert pace.left(steps=50, epochs=3) == "run ends in 50 s or more"
    pace.epoch(1004.0)
    assert pace.left(steps=50, epochs=3) == "run ends in 1 min 02 s"
    for number in range(1, 102):
        pace.step(510.0 + 2 * number)  # slower now, and that is what counts
    assert pace.left(steps=50, epochs=2) == "run ends in 1 min 48 s"
    pace.epoch(1005.0)
    assert pace.left(steps=50, epochs=1) == "run ends in 1 min 41 s"
    assert pace.left(steps=0, epochs=0) == ""


def test_times_in_words():
    words = {0: "0.0 s", 9.94: "9.9 s", 9.96: "10 s", 59.7: "1 min 00 s", 125: "2 min 05 s"}
    words |= {3599.6: "1 h 00 min", 11_100: "3 h 05 min", 86_400 * 2 + 10_800: "2 d 03 h"}
    assert {seconds: duration(seconds) for seconds in words} == words
    record = {
        "total_seconds": 66,
        "seconds": {"start": 4, "compilation": 50, "data": 2, "lost": 10},
        "cache": {"hits": 3, "misses": 1},
    }
    assert in_words(record) == (
        "1 min 06 s: start 4.0 s, compilation 50 s (cache: 3 hits, 1 misses), "
        "waiting for data 2.0 s, lost since a checkpoint 10 s"
    )
