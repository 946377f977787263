from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.devices.strategies import check_divisible, make_strategy
from jaxunet.errors import ConfigError
from jaxunet.learning.steps import (
    AXIS,
    eval_step,
    init_state,
    make_recipe,
    predict_step,
    train_step,
)

CONFIG = Config(
    data=DataConfig(image_size=8),
    model=ModelConfig(width=4, depth=2, init="he", norm="batch", conv_bias=False),
    optimizer=OptimizerConfig(
        name="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=2,
        clip_norm=1.0,
        accumulate_steps=2,
        ema_decay=0.9,
    ),
    train=TrainConfig(loss="bce_dice"),
)


def batches(count: int, padded_last: int = 3):
    """Global batches of 8; the last one's final `padded_last` examples are padding."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        weight = np.ones(16, np.uint8)
        if i == count - 1:
            weight[16 - padded_last :] = 0
        made.append(
            {
                "image": rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
                "mask": rng.integers(0, 2, (16, 8, 8, 1), np.uint8) * 255,
                "weight": weight,
            }
        )
    return made


@cache
def initial_state(recipe):
    return jax.tree.map(np.asarray, init_state(recipe))


def run(parallel: str, devices: int):
    recipe = make_recipe(CONFIG, total_steps=6)
    strategy = make_strategy(parallel, jax.devices()[:devices])
    step = strategy.compile(partial(train_step, recipe), outputs="replicated", donate=True)
    state = strategy.replicate(initial_state(recipe))
    losses = []
    for batch in batches(6):
        state, metrics = step(state, strategy.split(batch))
        losses.append(strategy.fetch(metrics)["loss"])
    host = strategy.fetch(state)
    variables = strategy.replicate(host.variables)
    evaluated = strategy.compile(partial(eval_step, recipe), outputs="replicated")
    predicted = strategy.compile(partial(predict_step, recipe), outputs="split")
    batch = batches(1)[0]
    return {
        "losses": np.array(losses),
        "state": host,
        "eval": strategy.fetch(evaluated(variables, strategy.split(batch))),
        "probabilities": strategy.gather(predicted(variables, strategy.split(batch["image"]))),
    }


@pytest.fixture(scope="module")
def alone():
    return run("jit", 1)


@pytest.mark.parametrize(
    ("parallel", "devices"), [("pmap", 1), ("pmap", 2), ("pmap", 8), ("jit", 2), ("jit", 8)]
)
def test_devices_and_strategy_change_no_number(parallel, devices, alone):
    expected, found = alone, run(parallel, devices)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(found["state"]), jax.tree.leaves(expected["state"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(found["eval"]["loss"], expected["eval"]["loss"], rtol=1e-4)
    assert found["eval"]["counts"].shape == (16, 4)
    assert np.abs(found["eval"]["counts"] - expected["eval"]["counts"]).max() <= 1
    np.testing.assert_allclose(
        found["probabilities"], expected["probabilities"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_a_step_of_one_configuration_is_compiled_once_in_a_process(parallel):
    def compiled(config: Config, devices: int = 2):
        strategy = make_strategy(parallel, jax.devices()[:devices])
        return strategy.compile(partial(eval_step, make_recipe(config)), outputs="replicated")

    elsewhere = replace(CONFIG, data=replace(CONFIG.data, synthetic_seed=1))
    assert compiled(CONFIG) is compiled(elsewhere)
    others = replace(CONFIG, train=replace(CONFIG.train, threshold=0.25))
    assert compiled(CONFIG) is not compiled(others)
    assert compiled(CONFIG) is not compiled(CONFIG, devices=1)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_the_state_given_to_a_step_is_donated(parallel):
    recipe = make_recipe(CONFIG, total_steps=6)
    strategy = make_strategy(parallel, jax.devices()[:2])
    step = strategy.compile(partial(train_step, recipe), outputs="replicated", donate=True)
    host = initial_state(recipe)
    before = jax.tree.map(np.copy, host)
    state = strategy.replicate(host)
    step(state, strategy.split(batches(1)[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    # The host's own copy must not be written over by it.
    for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_no_hidden_transfer_happens_in_a_step(parallel):
    recipe = make_recipe(CONFIG, total_steps=6)
    strategy = make_strategy(parallel, jax.devices()[:2])
    step = strategy.compile(partial(train_step, recipe), outputs="replicated", donate=True)
    state = strategy.replicate(initial_state(recipe))
    state, _ = step(state, strategy.split(batches(1)[0]))
    with jax.transfer_guard("disallow"):
        for batch in batches(2):
            state, metrics = step(state, strategy.split(batch))
            strategy.fetch(metrics)


def test_padding_changes_neither_loss_nor_update():
    """A batch of 5 real and 3 padding examples is one of 5 and 1, each in two parts."""
    recipe = make_recipe(CONFIG, total_steps=6)
    full = {name: array[-8:] for name, array in batches(1)[0].items()}
    one = make_strategy("jit", jax.devices()[:1])
    garbage = {**full, "image": full["image"].copy()}
    garbage["image"][5:] = 77
    short = {name: array[:6] for name, array in full.items()}
    results = []
    for batch in (full, garbage, short):
        step = one.compile(partial(train_step, recipe), outputs="replicated")
        state, metrics = step(one.replicate(initial_state(recipe)), one.split(batch))
        results.append((one.fetch(state), one.fetch(metrics)))
    for state, metrics in results[1:]:
        np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(results[0][0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_uneven_batch_is_refused_with_the_nearest_that_fit():
    with pytest.raises(ConfigError, match=r"train.batch_size is 10.*8 devices.*8 or 16"):
        check_divisible("train.batch_size", 10, 8)
    check_divisible("train.batch_size", 16, 8)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_replicated_values_have_no_axis_of_devices(parallel):
    """Each device holds the value itself; pmap's are where the other strategy puts them."""
    strategy = make_strategy(parallel, jax.devices()[:2])
    value = strategy.replicate(np.arange(3.0, dtype=np.float32))
    step = strategy.compile(lambda a, b: a + b.sum(), outputs="replicated")
    for array in (value, step(value, strategy.split(np.zeros(4, np.float32)))):
        assert array.shape == (3,)
        assert [shard.data.shape for shard in array.addressable_shards] == [(3,), (3,)]
    other = make_strategy("jit", jax.devices()[:2]).replicate(np.zeros(3, np.float32))
    assert value.sharding == other.sharding


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_a_step_runs_uncompiled(parallel):
    """As with JAX_DISABLE_JIT=1; sums over devices are as when it is compiled."""
    strategy = make_strategy(parallel, jax.devices()[:2])

    def step(state, rows):
        return {"sum": state["sum"] + jax.lax.psum((rows * state["scale"]).sum(), AXIS)}

    state = {"sum": np.float32(1), "scale": np.float32(3)}
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    with jax.disable_jit():
        compiled = strategy.compile(step, outputs="replicated", donate=True)
        found = strategy.fetch(compiled(strategy.replicate(state), strategy.split(rows)))
        doubled = strategy.compile(lambda a, b: 2 * b, outputs="split")
        rows_back = strategy.gather(doubled(strategy.replicate(state), strategy.split(rows)))
    assert found["sum"] == 1 + 3 * 28
    np.testing.assert_array_equal(rows_back, 2 * rows)
