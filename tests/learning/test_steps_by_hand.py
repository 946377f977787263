"""The steps of a model of four numbers, whose every result NumPy gives in float64."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunet.augmentation_config import Ranges
from jaxunet.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.learning.augment import normalize
from jaxunet.learning.losses import LOSSES
from jaxunet.learning.steps import (
    AXIS,
    Recipe,
    eval_step,
    init_state,
    make_recipe,
    maps_step,
    predict_step,
    state_from_variables,
    train_step,
)
from jaxunet.model.unet import UNet

SEED = 2**40 + 3


class Pixelwise(UNet):
    """One product a pixel, of which a row at the bottom and three columns are cut off.

    Its statistic is half of what it was and the number of real examples; it is added.
    """

    @nn.compact
    def __call__(self, images, weight=None, *, train=False):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (images.shape[-1], 1))
        bias = self.param("bias", nn.initializers.zeros, (1,))
        logits = images @ kernel + bias
        if self.config.norm == "batch":
            seen = self.variable("batch_stats", "seen", jnp.zeros, ())
            logits += 0.1 * seen.value
            if train:
                seen.value = 0.5 * seen.value + jnp.sum(weight, dtype=jnp.float32)
        return logits[:, :-1, 1:-2]


# Decay and momentum, so that what the optimizer is given and gives back both count.
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.5, momentum=0.9))


def recipe_of(norm="batch", **options):
    given = {
        "model": Pixelwise(ModelConfig(width=2, depth=2, norm=norm), AXIS),
        "optimizer": OPTIMIZER,
        "loss": LOSSES["bce"],
        "microbatches": 1,
        "augment": Ranges(),
        "seed": SEED,
        "ema_decay": None,
        "threshold": 0.5,
    }
    return Recipe(**(given | options))


def batch_of(count, real=None, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 4, 7, 3)).astype(np.uint8),
        "mask": rng.choice([0, 1, 255], (count, 4, 7, 1)).astype(np.uint8),
        "weight": (np.arange(count) < (count if real is None else real)).astype(np.uint8),
    }


def start(recipe, step=0):
    variables = {"params": {"kernel": jnp.array([[0.5], [-1.0], [2.0]]), "bias": jnp.ones(1)}}
    if recipe.model.config.norm == "batch":
        variables["batch_stats"] = {"seen": jnp.float32(3)}
    return replace(state_from_variables(recipe, variables), step=jnp.int32(step))


def in_shards(tree, shards):
    return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def on_shards(step, recipe, first, batch, shards):
    """A step on the named axis, and one shard's results after all have been compared."""
    mapped = jax.vmap(partial(step, recipe), in_axes=(None, 0), axis_name=AXIS)
    every = jax.tree.map(np.asarray, jax.jit(mapped)(first, in_shards(batch, shards)))
    for leaf in jax.tree.leaves(every):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: x[0], every)


def float64(images):
    return (images / 255 - 0.5) / 0.5


def flipped(batch, step):
    """By JAX's own keys: seed, step, and place in the global batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), SEED >> 32), step)
    images, masks = batch["image"].copy(), batch["mask"].copy()
    for place in range(len(images)):
        if jax.random.bernoulli(jax.random.fold_in(key, place)):
            images[place], masks[place] = images[place, :, ::-1], masks[place, :, ::-1]
    return {**batch, "image": images, "mask": masks}


def gradient_by_hand(params, seen, batch, parts=1, shards=1):
    """Loss, gradients and the statistic of the first shard."""
    real, loss, kernel, bias = batch["weight"].sum(), 0.0, np.zeros((3, 1)), np.zeros(1)
    first = None
    for shard in range(shards):
        shard_seen, size = seen, len(batch["image"]) // shards
        for part in range(parts):
            rows = slice(shard * size + part, (shard + 1) * size, parts)
            w = batch["weight"][rows, None, None, None]
            x = float64(batch["image"][rows])[:, :-1, 1:-2]
            # The middle of the mask, which a row and three columns less leave.
            y = (batch["mask"][rows] > 0)[:, :3, 1:5]
            z = x @ params["kernel"] + params["bias"] + 0.1 * shard_seen
            loss += (w * (np.logaddexp(0, z) - y * z)).sum() / 12
            error = w * (1 / (1 + np.exp(-z)) - y) / 12
            kernel += np.einsum("bhwi,bhwo->io", x, error)
            bias += error.sum((0, 1, 2))
            shard_seen = 0.5 * shard_seen + w.sum()
        first = shard_seen if first is None else first
    real = max(real, 1)
    return loss / real, {"kernel": kernel / real, "bias": bias / real}, first


def assert_near(found, expected, tolerance=2e-5):
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), found, expected
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_two_updates_are_those_computed_by_hand(parts):
    """Two shards alike, so that each has the statistic of both; all else may differ."""
    recipe = recipe_of(microbatches=parts, ema_decay=0.15)
    state, first, momentum, seen = start(recipe, 4), start(recipe), None, 3.0
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), first.params)
    ema, ema_seen = params, 3.0
    for n in (5, 6):
        batch = batch_of(8, seed=n)
        batch["weight"] = np.array([1, 2, 1, 0] * 2, np.uint8)
        real = {**batch, "weight": (batch["weight"] > 0).astype(float)}
        state, metrics = on_shards(train_step, recipe, state, batch, 2)
        loss, grads, seen = gradient_by_hand(params, seen, real, parts, 2)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert_near(metrics, {"loss": loss, "grad_norm": norm, "examples": 6.0})
        decayed = jax.tree.map(lambda g, p: g + 0.2 * p, grads, params)
        momentum = momentum or jax.tree.map(np.zeros_like, decayed)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, decayed)
        params = jax.tree.map(lambda p, m: p - 0.5 * m, params, momentum)
        # The average's decay is that of the step's number: 6/15, 7/16, but at most 0.15.
        ema = jax.tree.map(lambda e, p: 0.15 * e + 0.85 * p, ema, params)
        ema_seen = 0.15 * ema_seen + 0.85 * seen
        assert state.step == n
        assert_near(state.params, params)
        assert_near(state.batch_stats, {"seen": seen})
        assert_near(state.ema, ema)
        assert_near(state.ema_stats, {"seen": ema_seen})


def test_flips_follow_seed_step_and_place_in_the_global_batch():
    recipe, batch = (
        recipe_of(norm="none", augment=Ranges(flip=True), ema_decay=0.9),
        batch_of(8),
    )
    first = start(recipe, 9)
    assert first.ema_stats is None
    state, metrics = on_shards(train_step, recipe, first, batch, 2)
    turned = flipped(batch, 9)
    assert 0 < (turned["image"] != batch["image"]).any((1, 2, 3)).sum() < 8
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), first.params)
    loss, _, _ = gradient_by_hand(params, 0.0, turned)
    assert_near(metrics["loss"], loss)
    assert state.batch_stats == {}
    assert state.ema_stats is None
    # At the tenth step the average keeps 11/20.
    assert_near(
        state.ema,
        jax.tree.map(lambda e, p: 11 / 20 * e + 9 / 20 * p, params, state.params),
    )


@pytest.mark.parametrize("real", [0, 1])
def test_a_batch_of_padding_alone_has_no_loss_and_one_example_its_own(real):
    recipe, batch = recipe_of(norm="none"), batch_of(2, real=real)
    first = start(recipe)
    state, metrics = on_shards(train_step, recipe, first, batch, 2)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), first.params)
    loss, grads, _ = gradient_by_hand(params, 0.0, batch)
    assert_near(metrics["loss"], loss)
    assert metrics["examples"] == real
    assert state.ema is None
    assert_near(state.params, jax.tree.map(lambda p, g: p - 0.5 * (g + 0.2 * p), params, grads))


def logits_by_hand(batch):
    x = float64(batch["image"])[:, :-1, 1:-2]
    z = x @ np.array([[0.5], [-1.0], [2.0]]) + 1 + 0.1 * 3
    return np.pad(z, ((0, 0), (0, 1), (1, 2), (0, 0)), mode="edge")


def test_evaluation_counts_every_pixel_of_every_shards_examples():
    recipe, batch = recipe_of(threshold=0.7), batch_of(4)
    found = on_shards(eval_step, recipe, start(recipe).variables, batch, 2)
    z, y = logits_by_hand(batch), batch["mask"] > 0
    assert_near(found["loss"], (np.logaddexp(0, z) - y * z).mean((1, 2, 3)))
    p = 1 / (1 + np.exp(-z)) > 0.7
    counts = [(p & y).sum((1, 2, 3)), (p & ~y).sum((1, 2, 3))]
    counts += [(~p & y).sum((1, 2, 3)), (~p & ~y).sum((1, 2, 3))]
    np.testing.assert_array_equal(found["counts"], np.stack(counts, axis=-1))


def test_maps_of_an_ensemble_are_of_the_mean_probability_at_the_temperature():
    one, batch = recipe_of(threshold=0.7), batch_of(4)
    recipe = replace(one, others=(one.model,), temperature=2.0)
    variables = start(one).variables
    higher = variables["params"]["bias"] + 1.5
    second = {**variables, "params": {**variables["params"], "bias": higher}}
    found = on_shards(maps_step, recipe, (variables, second), batch, 2)
    z = logits_by_hand(batch)
    p = (1 / (1 + np.exp(-z)) + 1 / (1 + np.exp(-z - 1.5))) / 2
    z = (np.log(p) - np.log(1 - p)) / 2.0
    p, y = 1 / (1 + np.exp(-z)), batch["mask"] > 0
    assert_near(found["logits"], z[..., 0])
    assert_near(found["probabilities"], p[..., 0])
    np.testing.assert_array_equal(found["truth"], y[..., 0])
    assert_near(found["loss"], (np.logaddexp(0, z) - y * z).mean((1, 2, 3)))
    np.testing.assert_array_equal(found["counts"][:, 0], ((p > 0.7) & y).sum((1, 2, 3)))


def test_a_probability_is_that_of_the_logit_and_nan_where_that_is_not_finite():
    recipe, images = recipe_of(), batch_of(2)["image"]
    state = start(recipe)
    predict = jax.jit(partial(predict_step, recipe))
    found = predict(state.variables, images)
    assert_near(found, 1 / (1 + np.exp(-logits_by_hand({"image": images}))))
    assert found.shape == (2, 4, 7, 1)
    infinite = {**state.variables, "params": {**state.params, "bias": jnp.full(1, -jnp.inf)}}
    assert np.isnan(predict(infinite, images)).all()


class Uncut(UNet):
    """Each pixel's first channel; a row or a column less, where it is asked for."""

    rows: int = 0
    columns: int = 0

    def __call__(self, images, weight=None, *, train=False):
        _, height, width, _ = images.shape
        return images[:, : height - self.rows, : width - self.columns, :1]


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (2, 0), (0, 5)])
def test_what_is_cut_at_one_axis_is_made_up_at_that_axis(rows, columns):
    images = batch_of(1)["image"]
    recipe = recipe_of(model=Uncut(ModelConfig(), None, rows, columns))
    found = predict_step(recipe, {}, jnp.asarray(images))
    z = float64(images)[:, : 4 - rows, : 7 - columns, :1]
    border = (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
    z = np.pad(z, ((0, 0), *border, (0, 0)), mode="edge")
    assert_near(found, 1 / (1 + np.exp(-z)))


def test_the_first_state_is_drawn_from_the_seed_and_averages_start_at_it():
    drawn = set()
    for seed in (3, SEED):
        recipe = recipe_of(seed=seed, ema_decay=0.9)
        state = init_state(recipe)
        key = jax.random.key(3, impl="rbg")
        key = jax.random.fold_in(key, seed >> 32) if seed > 3 else key
        expected = recipe.model.init(key, jnp.zeros((1, 8, 8, 3)))
        np.testing.assert_array_equal(state.params["kernel"], expected["params"]["kernel"])
        drawn.add(float(state.params["kernel"][0, 0]))
    assert len(drawn) == 2
    assert state.step.dtype == jnp.int32
    assert state.step == 0
    assert state.batch_stats == {"seen": 0}
    for average, value in (("ema", "params"), ("ema_stats", "batch_stats")):
        pairs = (getattr(state, average), getattr(state, value))
        for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_state_holds_averages_of_their_own_only_where_the_recipe_asks_for_them():
    variables = {"params": {"w": jnp.ones(2)}, "batch_stats": {"m": jnp.zeros(2)}}
    plain = state_from_variables(recipe_of(), variables)
    assert (plain.ema, plain.ema_stats) == (None, None)
    assert [x.tolist() for x in jax.tree.leaves(plain.opt_state)] == [[0, 0]]  # momentum
    assert plain.variables["params"] is plain.params
    assert plain.variables["batch_stats"] is plain.batch_stats
    averaged = state_from_variables(recipe_of(ema_decay=0.5), variables)
    # Two buffers: a step is given both away.
    pointers = {x["w"].unsafe_buffer_pointer() for x in (averaged.ema, averaged.params)}
    assert len(pointers) == 2
    assert averaged.ema_stats.keys() == {"m"}
    mixed = replace(averaged, ema={"w": 2}, ema_stats={"m": 3})
    assert mixed.variables == {"params": {"w": 2}, "batch_stats": {"m": 3}}
    stateless = state_from_variables(recipe_of(ema_decay=0.5), {"params": variables["params"]})
    assert stateless.batch_stats == {}
    assert stateless.ema_stats is None


def test_a_recipe_is_what_the_configuration_names():
    config = Config(
        model=ModelConfig(width=3, depth=2),
        optimizer=OptimizerConfig(
            learning_rate=0.5,
            schedule="cosine",
            name="sgd",
            momentum=0.0,
            accumulate_steps=3,
            ema_decay=0.7,
        ),
        train=TrainConfig(loss="bce_dice", augment="none", seed=11, threshold=0.4),
    )
    recipe = make_recipe(config, 2)
    assert recipe.model == UNet(config.model, AXIS)
    assert recipe.loss is LOSSES["bce_dice"]
    assert (recipe.microbatches, recipe.augment, recipe.seed) == (3, Ranges(), 11)
    assert (recipe.ema_decay, recipe.threshold) == (0.7, 0.4)
    flipping = make_recipe(replace(config, train=replace(config.train, augment="flip")), 2)
    assert flipping.augment == Ranges(flip=True)
    # A cosine of two updates; without a length, the rate stays.
    for given, rates in ((recipe, (0.5, 0.25)), (make_recipe(config), (0.5, 0.5))):
        state = given.optimizer.init(jnp.zeros(()))
        for rate in rates:
            update, state = given.optimizer.update(jnp.ones(()), state)
            assert update == pytest.approx(-rate)
    # The same functions, so that what is made of them is compiled once.
    assert make_recipe(config, 2) is recipe


def test_pixels_go_from_minus_one_to_one():
    images = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    found = normalize(jnp.asarray(images))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0, 0, 0], [-1, -0.6, 1], atol=1e-6)
