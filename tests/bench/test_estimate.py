"""Steps compiled for a TPU slice that is not there; the estimates of their costs."""

import importlib.util
import re
from dataclasses import replace
from math import prod

import jax
import numpy as np
import pytest

from jaxunet.bench import estimate as estimates
from jaxunet.bench.estimate_figures import draw
from jaxunet.bench.estimate_tables import show
from jaxunet.bench.program import Operation
from jaxunet.bench.steps import initial_state
from jaxunet.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxunet.devices import ahead
from jaxunet.devices.chips import H100, H100_CONVOLUTION_SHARE, TPUS
from jaxunet.devices.strategies import STRATEGIES
from jaxunet.errors import ConfigError

CONFIG = Config(
    data=DataConfig(image_size=16),
    model=ModelConfig(width=2, depth=2),
    train=TrainConfig(batch_size=8, eval_batch_size=8),
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (the extra [tpu])",
)


@needs_libtpu
@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_all_steps_compile_for_a_slice_that_is_not_there(parallel, tmp_path, capsys):
    hlo = tmp_path / "train.hlo"
    topology = ahead.absent("v5e:2x2")
    point = estimates.estimate(topology, CONFIG, parallel, hlo=hlo)
    state = initial_state(CONFIG)
    train, evaluation, prediction = (point[mode] for mode in ("train", "eval", "predict"))

    # The gradients meet, each once, and nothing else of that size does.
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    reduced = train["collectives"]["all-reduce"]["bytes"]
    assert gradients <= reduced <= gradients + 64
    assert set(evaluation["collectives"]) <= {"all-gather", "all-reduce"}
    assert evaluation["collectives"]
    assert prediction["collectives"] == {}

    # Of the state, no step has two copies.
    held = sum(leaf.nbytes for leaf in map(np.asarray, jax.tree.leaves(state)))
    assert train["memory"]["aliased"] >= held
    assert evaluation["memory"]["aliased"] == 0
    memory = train["memory"]
    parts = sum(memory[part] for part in ("arguments", "outputs", "temporaries", "program"))
    assert memory["in_all"] == parts - memory["aliased"]
    assert memory["fits"]

    # The parts are the whole, and that is what the program says.
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo.read_text())))
    assert train["estimated_cycles"] == sum(train["by_kind"].values()) == cycles > 0
    assert train["step_seconds"] == pytest.approx(cycles / TPUS["v5e"].clock)
    assert train["by_kind"]["convolution"] > 0
    assert train["by_kind"]["optimizer"] > 0
    assert any(each["layer"] == "encoder/level_0/conv_0" for each in train["dearest"])

    result = {"points": [point], "weak_scaling": estimates.weak_scaling([point])}
    show(result)
    assert estimates.ESTIMATE in capsys.readouterr().out
    draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know_is_one_sentence():
    with pytest.raises(ConfigError, match=r"v5e:3x3, which libtpu does not know"):
        ahead.absent("v5e:3x3")


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "h100:9", "h100", ""])
def test_an_unknown_topology_is_named_with_those_that_there_are(name):
    with pytest.raises(ConfigError, match=re.escape(f"--topology is {name!r}")):
        ahead.absent(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "[tpu]"), ("h100:1", "[cuda]")])
def test_without_its_compiler_the_extra_to_install_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(extra)):
        ahead.absent(name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_outline_is_of_what_a_strategy_places(name):
    strategy = STRATEGIES[name](jax.devices()[:4])
    state = {"a": np.zeros((3, 5), np.float32)}
    batch = {"image": np.zeros((8, 2, 2, 3), np.uint8), "weight": np.zeros(8, np.uint8)}
    outline = strategy.outline(state, batch)
    placed = strategy.replicate(state), strategy.split(batch)

    def facts(x):
        return x.shape, x.dtype, x.sharding

    assert jax.tree.map(facts, outline) == jax.tree.map(facts, placed)


def test_only_products_of_float32_take_twice_as_long_on_a_gpu():
    topology = ahead.Topology("h100:1", H100, "gpu", [], {})
    product = Operation("dot", "convolution", "", False, "f32[2]", flops=1e12, operands="bf16")
    rate = H100_CONVOLUTION_SHARE * H100.flops
    assert estimates.seconds_of(product, topology) == pytest.approx(1e12 / rate)
    single = replace(product, operands="f32")
    assert estimates.seconds_of(single, topology) == pytest.approx(2e12 / rate)
    moving = replace(product, moved_bytes=10**11)
    assert estimates.seconds_of(moving, topology) == pytest.approx(1e11 / H100.memory_rate)


def test_weak_scaling_adds_what_the_collectives_take():
    train = {
        "step_seconds": 0.032,
        "seconds_by_kind": {"collective": 0.002},  # the compiler's own, not counted twice
        "collective_seconds": 0.01,
        "collectives": {"all-reduce": {"count": 2, "bytes": 70}},
    }
    setting = {"topology": "v5e:2x2", "devices": 4, "batch_size": 32}
    row = estimates.weak_scaling([{"setting": setting, "train": train}])[0]
    assert row["images_per_second"] == pytest.approx(800)
    assert row["share_computing"] == pytest.approx(0.75)
    assert row["collective_bytes"] == 70


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    tried = []

    def compile_step(topology, config, parallel, mode):
        tried.append(config.train.batch_size)
        return "RESOURCE_EXHAUSTED" if config.train.batch_size > 4 * 50 else config

    monkeypatch.setattr(estimates, "compile_step", compile_step)
    monkeypatch.setattr(
        estimates,
        "memory",
        lambda config, _: {"fits": config.train.batch_size <= 4 * 37},
    )
    topology = ahead.Topology("v5e:2x2", TPUS["v5e"], "tpu", jax.devices()[:4], {})
    found = estimates.largest_batch(topology, CONFIG, "jit")
    assert found == {"remat": False, "batch_size_per_device": 37}
    assert len(tried) < 14


def test_a_file_of_something_else_is_refused_to_be_drawn_beside(tmp_path):
    other = tmp_path / "benchmark.json"
    other.write_text('{"points": []}')
    with pytest.raises(ConfigError, match=r"benchmark\.json"):
        estimates.points_of(other)


def test_the_chips_peaks_follow_from_their_clocks():
    for kind, units in {"v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}.items():
        assert TPUS[kind].flops == pytest.approx(2 * units * TPUS[kind].clock, rel=0.01)


def test_accumulated_batches_are_refused():
    topology = ahead.Topology("v5e:2x2", TPUS["v5e"], "tpu", jax.devices()[:4], {})
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, accumulate_steps=2))
    with pytest.raises(ConfigError, match="accumulate_steps"):
        estimates.estimate(topology, config, "jit")


def test_shapes_of_a_batch_are_those_of_a_random_one():
    from jaxunet.bench.steps import random_batch

    shapes = estimates.batch_shapes(CONFIG)
    real = random_batch(CONFIG, 8)
    assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {
        k: (v.shape, v.dtype) for k, v in real.items()
    }
    assert prod(shapes["image"].shape) == 8 * 16 * 16 * 3
