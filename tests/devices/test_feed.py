import re
import time

import jax
import numpy as np
import pytest

from jaxunet.config import DataConfig
from jaxunet.data.sampler import BatchSampler
from jaxunet.devices import compiling
from jaxunet.devices import feed as feed_module
from jaxunet.devices.compiling import Compilation
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import ConfigError

SIDE = 6


class Pictures:
    """Eleven examples that count how often they are read."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (11, SIDE, SIDE, 3), np.uint8)
        self.masks = rng.integers(0, 2, (11, SIDE, SIDE, 1), np.uint8) * np.uint8(255)
        self.read = np.zeros(11, int)

    def __len__(self):
        return 11

    def __getitem__(self, index):
        self.read[index] += 1
        return {"image": self.images[index], "mask": self.masks[index]}


def step(replicated, batch):
    """A step whose outputs are the batch itself."""
    del replicated
    return jax.lax.all_gather(batch, "data", tiled=True)


def seen_by_a_step(cache, parallel, pictures, epochs=2):
    config = DataConfig(image_size=SIDE, cache=cache)
    strategy = make_strategy(parallel, jax.devices()[:2])
    feed = Feed(strategy, pictures, config, progress=False)
    order = BatchSampler(11, batch_size=4, seed=3)
    compiled = feed.compile(step, outputs="replicated")
    with jax.transfer_guard("disallow"):
        nothing = strategy.replicate(np.float32(0))
        return [
            strategy.fetch(compiled(nothing, feed.place(batch)))
            for batch in feed.batches(order, epochs * order.batches_per_epoch)
        ]


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
@pytest.mark.parametrize("cache", ["host", "device"])
def test_a_step_sees_the_same_batches_under_every_cache(cache, parallel):
    expected = seen_by_a_step("none", parallel, Pictures())
    cached = Pictures()
    found = seen_by_a_step(cache, parallel, cached)
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
    assert expected[2]["weight"].tolist() == [1, 1, 1, 0]
    assert not expected[2]["image"][3].any()
    assert cached.read.tolist() == [1] * 11


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
@pytest.mark.parametrize("cache", ["none", "device"])
def test_what_is_compiled_before_the_data_are_read_is_not_compiled_again(
    cache, parallel, monkeypatch
):
    monkeypatch.setattr(compiling, "pays", lambda: True)
    strategy = make_strategy(parallel, jax.devices()[:2])
    pictures, config = Pictures(), DataConfig(image_size=SIDE, cache=cache)
    feed = Feed(strategy, pictures, config, progress=False, fill=False)
    compiled = feed.compile(step, outputs="replicated", donate=True)
    outline = jax.ShapeDtypeStruct((), np.float32)
    compilation = Compilation("it", lambda: feed.lower(compiled, outline, 4), show=False)
    assert not pictures.read.any()
    compilation.finish()
    feed.fill()
    batch = next(feed.batches(BatchSampler(11, batch_size=4, seed=3), 1))
    arguments = strategy.replicate(np.float32(0)), feed.place(batch)
    programs = []
    listener = lambda event, *_, **__: programs.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        seen = strategy.fetch(compiled(*arguments))
        jax.jit(lambda x: x + 1)(1)  # which is heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert sum("backend_compile" in event for event in programs) == 1
    np.testing.assert_array_equal(seen["weight"], [1, 1, 1, 1])


def test_what_the_compiler_refuses_is_raised_and_what_takes_long_is_said(capsys, monkeypatch):
    class Slow(jax.stages.Lowered):
        def __init__(self):
            """Of nothing."""

        def compile(self):
            time.sleep(0.05)

    class Refused(Slow):
        def compile(self):
            raise ValueError("out of memory")

    monkeypatch.setattr(compiling, "pays", lambda: True)
    monkeypatch.setattr(compiling, "SILENT_SECONDS", 0.001)
    Compilation("these", Slow, Slow).finish()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "compiling these"
    assert re.fullmatch(r"compiled these in \d\.\d s", said[1])
    with pytest.raises(ValueError, match="out of memory"):
        Compilation("these", Slow, Refused).finish()


def test_on_a_cpu_nothing_is_compiled_before_it_is_called(capsys):
    def lower():
        raise AssertionError("it was lowered")

    Compilation("these", lower, lower).finish()
    assert capsys.readouterr().err == ""


def test_only_indices_cross_to_the_devices():
    strategy = make_strategy("jit", jax.devices()[:1])
    feed = Feed(strategy, Pictures(), DataConfig(image_size=SIDE, cache="device"))
    batch = next(feed.batches(BatchSampler(11, batch_size=4), 3))
    assert batch.keys() == {"index", "weight"}
    assert sum(array.nbytes for array in batch.values()) == 4 * (4 + 1)


def test_a_split_larger_than_a_device_is_refused_before_it_is_read(monkeypatch):
    class Small:
        def memory_stats(self):
            return {"bytes_limit": 1000}

    monkeypatch.setattr(feed_module.jax, "local_devices", lambda: [Small()])
    pictures = Pictures()
    with pytest.raises(ConfigError, match=r"data\.cache 'device'.*11 images of 6 px"):
        Feed(make_strategy("jit"), pictures, DataConfig(image_size=SIDE, cache="device"))
    assert not pictures.read.any()
