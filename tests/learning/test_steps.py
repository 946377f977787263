"""What one step computes: parts of a batch, averages, seeds, borders and thresholds."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data.sampler import BatchSampler, generator
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import RunError
from jaxunet.learning.augment import example_keys, random_flip, seed_key
from jaxunet.learning.steps import eval_step, init_state, make_recipe, train_step
from jaxunet.model.normalization import BatchNorm
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.earlier import forms
from jaxunet.runs.loading import load

CONFIG = Config(
    data=DataConfig(image_size=8),
    model=ModelConfig(width=2, depth=2, init="he"),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.1),
    train=TrainConfig(loss="bce_dice"),
)


def discs(count, side, seed=0):
    """Pictures with a bright disc each, and the discs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    centre = rng.uniform(0.3 * side, 0.7 * side, (count, 2, 1, 1))
    radius = rng.uniform(0.15, 0.3, (count, 1, 1)) * side
    disc = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
    images = rng.integers(0, 120, (count, side, side, 3)) + 100 * disc[..., None]
    return images.astype(np.uint8), (255 * disc[..., None]).astype(np.uint8)


def batch_of(count, side=8, real=None, seed=0):
    images, masks = discs(count, side, seed)
    weight = (np.arange(count) < (count if real is None else real)).astype(np.uint8)
    return {"image": images, "mask": masks, "weight": weight}


def with_parts(config, parts):
    return replace(config, optimizer=replace(config.optimizer, accumulate_steps=parts))


def trained(config, batches, devices=1):
    recipe = make_recipe(config, total_steps=1000)
    strategy = make_strategy("jit", jax.devices()[:devices])
    step = strategy.compile(partial(train_step, recipe), outputs="replicated")
    state = strategy.replicate(init_state(recipe))
    states, metrics = [], []
    for batch in batches:
        state, found = step(state, strategy.split(batch))
        states.append(strategy.fetch(state))
        metrics.append(strategy.fetch(found))
    return states, metrics


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance)


# With 3 real examples one of four parts holds nothing but padding.
@pytest.mark.parametrize("real", [16, 13, 3])
def test_a_batch_in_parts_gives_the_numbers_of_the_whole(real):
    batches = [batch_of(16, real=real, seed=seed) for seed in range(2)]
    whole, expected = trained(CONFIG, batches)
    parts, found = trained(with_parts(CONFIG, 4), batches, devices=2)
    assert_close(parts, whole)
    assert_close(found, expected)
    assert [m["examples"] for m in found] == [real, real]


def test_batch_norm_in_parts_is_the_same_on_any_number_of_devices():
    config = with_parts(replace(CONFIG, model=replace(CONFIG.model, norm="batch")), 2)
    batches = [batch_of(8, real=7, seed=seed) for seed in range(2)]
    (_, one), (_, two) = (trained(config, batches, devices)[0] for devices in (1, 4))
    assert_close(two, one, 1e-4)
    # Its statistics are those of each part in turn: here of the first layer's input.
    whole = trained(with_parts(config, 1), batches)[0][1]
    assert (
        np.abs(
            jax.tree.leaves(one.batch_stats)[0] - jax.tree.leaves(whole.batch_stats)[0]
        ).max()
        > 1e-3
    )


def test_padding_alone_leaves_batch_norms_statistics_and_is_normalised_by_them():
    norm = BatchNorm(axis_name=None)
    x = jnp.full((2, 3, 3, 2), 5.0)
    variables = {
        "params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
        "batch_stats": {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 9.0])},
    }
    y, after = norm.apply(variables, x, jnp.zeros(2, bool), train=True, mutable=["batch_stats"])
    assert_close(after["batch_stats"], variables["batch_stats"], 0)
    np.testing.assert_allclose(y[0, 0, 0], [2.0, 1.0], rtol=1e-5)


def test_statistics_are_averaged_with_the_weights():
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, norm="batch"),
        optimizer=replace(CONFIG.optimizer, ema_decay=0.3),
    )
    states, _ = trained(config, [batch_of(8, seed=seed) for seed in range(3)])
    first = init_state(make_recipe(config))
    for name, average in (("params", "ema"), ("batch_stats", "ema_stats")):
        expected = getattr(first, name)
        for n, state in enumerate(states, start=1):
            d = min(0.3, (1 + n) / (10 + n))
            expected = jax.tree.map(
                lambda e, x, d=d: d * e + (1 - d) * x, expected, getattr(state, name)
            )
            assert_close(getattr(state, average), expected)
    variables = states[-1].variables
    assert variables["params"] is states[-1].ema
    assert variables["batch_stats"] is states[-1].ema_stats


def dice_of(config, variables, batch):
    strategy = make_strategy("jit", jax.devices()[:1])
    step = strategy.compile(partial(eval_step, make_recipe(config)), outputs="replicated")
    counts = strategy.fetch(step(strategy.replicate(variables), strategy.split(batch)))[
        "counts"
    ]
    hit, wrong, missed, _ = counts.astype(float).T
    return (2 * hit / (2 * hit + wrong + missed)).mean()


def test_a_short_run_scores_no_less_with_the_average_than_without():
    config = Config(
        model=ModelConfig(width=4, depth=3, norm="batch", init="he"),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-2, schedule="cosine", ema_decay=0.999
        ),
        train=TrainConfig(loss="bce_dice"),
    )
    states, _ = trained(config, [batch_of(8, 16, seed=seed) for seed in range(60)])
    test = batch_of(64, 16, seed=1000)
    raw = dice_of(config, states[-1].replace(ema=None, ema_stats=None).variables, test)
    assert raw > 0.8
    assert dice_of(config, states[-1].variables, test) > raw - 0.01


@pytest.mark.parametrize("to_go_on", [False, True])
@pytest.mark.parametrize("form", [1, 2], ids=["without averaged statistics", "multi-steps"])
def test_checkpoints_of_earlier_versions_are_read(form, to_go_on, tmp_path):
    config = Config(
        model=ModelConfig(width=2, depth=2, norm="batch"),
        optimizer=OptimizerConfig(ema_decay=0.9),
    )
    state = jax.tree.map(np.asarray, init_state(make_recipe(config)))
    numbers = iter(range(1000))
    state = jax.tree.map(lambda x: np.full_like(x, next(numbers)), state)
    checkpoints = Checkpoints(tmp_path, "dice")
    checkpoints.save(list(forms(state))[form].replace(step=np.int32(7)), {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, "dice", read_only=not to_go_on)
    try:
        if form == 2 and to_go_on:
            with pytest.raises(RunError, match=r"accumulate_steps.* not resumed"):
                checkpoints.restore("latest", state)
            return
        step, found, _ = checkpoints.restore("latest", state)
    finally:
        checkpoints.close()
    expected = state.replace(step=np.int32(7), ema_stats=state.batch_stats)
    assert step == 7
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected, 0)


def test_weights_that_are_not_finite_are_not_loaded(tmp_path):
    state = jax.tree.map(np.array, init_state(make_recipe(CONFIG)))
    state.params["head"]["bias"][0] = np.inf
    with RunDirectory(tmp_path / "run", CONFIG, resume=False) as run:
        checkpoints = Checkpoints(run.path / "checkpoints", "dice")
        checkpoints.save(state, {"evaluated_epochs": 0})
        checkpoints.close()
        run.write_config({})
    with pytest.raises(RunError, match=r"of step 0, is of no use"):
        load(tmp_path / "run")


def test_all_bits_of_a_seed_count_and_small_seeds_are_what_they_were():
    for seed in (0, 7, 2**31, 2**32 - 1):
        for impl in (None, "rbg"):
            found = jax.random.key_data(seed_key(seed, impl))
            expected = jax.random.key_data(jax.random.key(seed, impl=impl))
            np.testing.assert_array_equal(found, expected)
    seeds = (5, 5 + 2**32, 5 + 2**33, 5 + 2**62, 2**63 - 1)
    assert len({tuple(jax.random.key_data(seed_key(seed)).tolist()) for seed in seeds}) == 5
    folded = jax.random.fold_in(jax.random.key(5), 2**30)
    np.testing.assert_array_equal(*map(jax.random.key_data, (seed_key(5 + 2**62), folded)))
    with jax.enable_x64(True):  # where JAX's own keys take all bits
        keys = seed_key(5 + 2**62), seed_key(5 + 2**32)
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[0], folded)))
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[1], seed_key(5 + 2**32))))


def test_orders_of_large_seeds_are_not_those_of_small_ones_at_another_epoch():
    np.testing.assert_array_equal(
        BatchSampler(50, 50, seed=5).indices(1), np.random.default_rng((5, 1)).permutation(50)
    )
    drawn = {
        generator(seed, epoch, 0).bytes(8)
        for seed in (5, 5 + 2**32, 5 + 2 * 2**32)
        for epoch in range(3)
    }
    assert len(drawn) == 9


def test_a_mask_is_flipped_with_its_image_and_others_at_the_next_step():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (32, 4, 6, 1), np.uint8)
    images = np.repeat(masks, 3, axis=-1)
    flipped = []
    for step in range(2):
        keys = example_keys(seed_key(0), jnp.int32(step), jnp.arange(32))
        seen, truth = random_flip(keys, jnp.asarray(images), jnp.asarray(masks))
        np.testing.assert_array_equal(seen, np.repeat(truth, 3, axis=-1))
        mirrored = (np.asarray(truth) == masks[:, :, ::-1]).all((1, 2, 3))
        same = (np.asarray(truth) == masks).all((1, 2, 3))
        assert (mirrored != same).all()
        flipped.append(mirrored)
    assert (flipped[0] != flipped[1]).any()
    assert 4 < flipped[0].sum() < 28


def test_training_flips_anew_at_each_step():
    """With a rate of next to nothing, only the flips can change the loss of one batch."""
    still = replace(CONFIG, optimizer=OptimizerConfig(name="sgd", learning_rate=1e-30))
    _, metrics = trained(still, [batch_of(8)] * 4)
    assert len({float(m["loss"]) for m in metrics}) > 1


def constant_logit(value):
    """A model, in crop mode on 9 pixels a side, whose every logit is `value`."""
    recipe = make_recipe(CONFIG)
    params = jax.tree.map(jnp.zeros_like, init_state(recipe).params)
    params["head"]["bias"] = jnp.full(1, value)
    return recipe, {"params": params, "batch_stats": {}}


@pytest.mark.parametrize(("logit", "lesion"), [(0.0, 0), (1e-3, 81), (-1e-3, 0)])
def test_a_probability_of_just_the_threshold_is_no_lesion_and_borders_count(logit, lesion):
    recipe, variables = constant_logit(logit)
    batch = {
        "image": np.zeros((1, 9, 9, 3), np.uint8),
        "mask": np.full((1, 9, 9, 1), 255, np.uint8),
    }
    strategy = make_strategy("jit", jax.devices()[:1])
    step = strategy.compile(partial(eval_step, recipe), outputs="replicated")
    counts = strategy.fetch(step(strategy.replicate(variables), strategy.split(batch)))[
        "counts"
    ]
    # The output is 8 pixels a side: the border has the nearest logit, not a logit of 0.
    assert counts.tolist() == [[lesion, 0, 81 - lesion, 0]]
