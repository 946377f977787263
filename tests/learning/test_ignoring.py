"""Pixels that don't count, against NumPy in float64 and PyTorch on the others alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from test_losses import theirs
from test_steps_by_hand import (
    assert_near,
    batch_of,
    gradient_by_hand,
    logits_by_hand,
    on_shards,
    recipe_of,
    start,
)

from jaxunet.augmentation_config import STRENGTHS, Ranges
from jaxunet.config import IGNORED
from jaxunet.learning.augment import augment
from jaxunet.learning.calibration import (
    count_logits,
    count_thresholds,
    cross_entropy,
    reliability,
)
from jaxunet.learning.losses import LOSSES
from jaxunet.learning.metrics import count
from jaxunet.learning.steps import maps_step, train_step
from jaxunet.learning.warping import maps, warp

RNG = np.random.default_rng(3)
SHAPE = (3, 6, 5, 1)
LOGITS = RNG.normal(0, 3, SHAPE).astype(np.float32)
TRUTH = (RNG.random(SHAPE) < 0.4).astype(np.float32)
COUNTED = RNG.random(SHAPE) < 0.6
COUNTED[2] = False


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_pixels_that_count(name):
    loss = jax.jit(jax.value_and_grad(summed, argnums=1, has_aux=True), static_argnums=0)
    garbage = np.where(COUNTED, LOGITS, np.inf)  # nothing of it comes through
    (_, found), grad = loss(LOSSES[name], garbage, np.where(COUNTED, TRUTH, 1), COUNTED)
    _, again = loss(LOSSES[name], LOGITS, np.where(COUNTED, TRUTH, 0), COUNTED)
    np.testing.assert_array_equal(grad, again)
    for image in range(2):
        kept = COUNTED[image]
        logits = torch.tensor(LOGITS[image][kept].astype(np.float64), requires_grad=True)
        truth = torch.tensor(TRUTH[image][kept].astype(np.float64))
        expected = theirs(name, logits, truth)
        expected.backward()
        assert found[image] == pytest.approx(float(expected), rel=1e-5)
        np.testing.assert_allclose(grad[image][kept], logits.grad, rtol=1e-4, atol=1e-6)
    assert found[2] == 0
    assert not np.asarray(grad)[~COUNTED].any()


def summed(loss, logits, mask, counted):
    each = loss(logits, mask, counted=counted)
    return each.sum(), each


def test_cross_entropy_of_one_image_is_pytorchs_with_its_ignore_index():
    two = torch.tensor(np.concatenate([0 * LOGITS, LOGITS], -1)[:1]).permute(0, 3, 1, 2)
    classes = np.where(COUNTED, TRUTH, -100)[:1, ..., 0].astype(np.int64)
    found = LOSSES["bce"](*map(jnp.asarray, (LOGITS, TRUTH)), counted=jnp.asarray(COUNTED))
    assert float(found[0]) == pytest.approx(
        F.cross_entropy(two, torch.tensor(classes), ignore_index=-100).item(), rel=1e-5
    )


def ignoring_batch():
    """Eight examples whose pixels in part don't count; of the third and of padding, none."""
    batch = batch_of(8, real=7)
    ignored = RNG.random(batch["mask"].shape) < 0.4
    ignored[2], ignored[7] = True, True
    return {**batch, "mask": np.where(ignored, np.uint8(IGNORED), batch["mask"])}


@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_is_of_the_pixels_and_the_examples_that_count(parts):
    recipe, batch = recipe_of(norm="none", ignores=True, microbatches=parts), ignoring_batch()
    first = start(recipe)
    state, metrics = on_shards(train_step, recipe, first, batch, 2)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), first.params)
    losses, gradients = [], []
    for n in (0, 1, 3, 4, 5, 6):
        # One pixel after the other, as if it were the whole picture.
        kept = np.argwhere(batch["mask"][n, :3, 1:5, 0] != IGNORED)
        one = {name: rows[[n] * len(kept)] for name, rows in batch.items()}
        x = (one["image"] / 255 - 0.5) / 0.5
        x = np.stack([x[i, r, c + 1] for i, (r, c) in enumerate(kept)])
        y = np.array([batch["mask"][n, r, c + 1, 0] > 0 for r, c in kept])
        z = (x @ params["kernel"] + params["bias"])[:, 0]
        error = 1 / (1 + np.exp(-z)) - y
        losses.append((np.logaddexp(0, z) - y * z).mean())
        gradients.append([(error[:, None] * x).mean(0)[:, None], error.mean()[None]])
    kernel, bias = (np.mean(each, axis=0) for each in zip(*gradients, strict=True))
    norm = np.sqrt((kernel**2).sum() + (bias**2).sum())
    assert_near(metrics, {"loss": np.mean(losses), "grad_norm": norm, "examples": 6.0})
    step = {"kernel": kernel, "bias": bias}
    assert_near(state.params, jax.tree.map(lambda p, g: p - 0.5 * (g + 0.2 * p), params, step))


def test_without_ignored_pixels_an_update_is_that_of_every_pixel():
    recipe, batch = recipe_of(norm="none", ignores=True), batch_of(4)
    _, metrics = on_shards(train_step, recipe, start(recipe), batch, 2)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), start(recipe).params)
    assert_near(metrics["loss"], gradient_by_hand(params, 0.0, batch)[0])


def test_evaluation_counts_the_pixels_that_count_and_says_which():
    recipe, batch = recipe_of(threshold=0.7, ignores=True), ignoring_batch()
    found = on_shards(maps_step, recipe, start(recipe).variables, batch, 2)
    z, y = logits_by_hand(batch)[..., 0], batch["mask"][..., 0] > 0
    kept, p = batch["mask"][..., 0] != IGNORED, 1 / (1 + np.exp(-z)) > 0.7
    np.testing.assert_array_equal(found["counted"], kept)
    for n in range(8):
        by_hand = [p & y, p & ~y, ~p & y, ~p & ~y]
        assert found["counts"][n].tolist() == [(each & kept)[n].sum() for each in by_hand]
        assert count(p[n], y[n], kept[n]).tolist() == found["counts"][n].tolist()
        losses = (np.logaddexp(0, z) - y * z)[n][kept[n]]
        assert_near(found["loss"][n], losses.mean() if len(losses) else 0.0)


def test_an_infinite_logit_is_seen_wherever_it_is():
    recipe, batch = recipe_of(norm="none", ignores=True), ignoring_batch()
    variables = {"params": {"kernel": jnp.zeros((3, 1)), "bias": jnp.full(1, jnp.inf)}}
    found = on_shards(maps_step, recipe, variables, batch, 1)
    assert np.isnan(found["loss"]).all()


def test_tables_of_the_calibration_are_those_of_the_pixels_that_count():
    logits, truth, kept = LOGITS[:2, ..., 0], TRUTH[:2, ..., 0] > 0, COUNTED[:2, ..., 0]
    probabilities = 1 / (1 + np.exp(-logits))
    for n in range(2):
        # The pixels that count as a picture of their own, of one row.
        p, z, t = (each[n][kept[n]][None, None] for each in (probabilities, logits, truth))
        every = slice(n, n + 1)
        for table, values, alone in (
            (reliability, probabilities, p),
            (count_thresholds, probabilities, p),
            (count_logits, logits, z),
        ):
            found = table(values[every], truth[every], kept[every])
            np.testing.assert_allclose(found, table(alone, t), rtol=1e-12)
        found = cross_entropy(logits[every], truth[every], 1.5, kept[every])
        np.testing.assert_allclose(found, cross_entropy(z, t, 1.5), rtol=1e-12)


def test_what_is_moved_takes_no_truth_from_a_pixel_that_has_none():
    """Nowhere but where SciPy, at the same places, takes none of one that doesn't count."""
    side, angle, zoom = 13, 0.4, 1.3
    masks = RNG.choice([0, IGNORED, 255], (1, side, side, 1), p=(0.5, 0.1, 0.4))
    masks = masks.astype(np.uint8)
    matrix = maps(*(jnp.array([x]) for x in (-1.0, 1, zoom, angle)))
    shift = jnp.array([[1.25, -2.0]])
    _, found = jax.jit(warp, static_argnums=4)(masks.repeat(3, -1), masks, matrix, shift, True)
    whole, middle = np.asarray(matrix[0], np.float64), (side - 1) / 2
    offset = middle + np.asarray(shift[0]) - whole @ np.full(2, middle)
    lesion, ignored = (
        ndimage.affine_transform(
            255.0 * (masks[0, ..., 0] == value), whole, offset, order=1, mode="reflect"
        )
        for value in (255, IGNORED)
    )
    expected = np.where(ignored >= 0.5, IGNORED, np.where(lesion > 127.5, 255, 0))
    # SciPy's places are of float64.
    sure = (np.abs(ignored - 0.5) > 0.01) & (np.abs(lesion - 127.5) > 0.01)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(found[0, ..., 0][sure], expected[sure])
    assert set(np.unique(found)) == {0, IGNORED, 255}


@pytest.mark.parametrize("ranges", [STRENGTHS["flip"], Ranges(flip=True, quarter_turns=True)])
def test_flips_and_quarter_turns_keep_what_does_not_count_as_it_is(ranges):
    masks = RNG.choice([0, IGNORED, 255], (16, 6, 6, 1)).astype(np.uint8)
    vary = jax.jit(partial(augment, ranges), static_argnames="ignores")
    keys = jax.random.split(jax.random.key(0), 16)
    found, moved = vary(keys, masks.repeat(3, -1), masks, np.ones(16, bool), ignores=True)
    np.testing.assert_array_equal(moved, found[..., :1])
    assert (np.asarray(moved) != masks).any()
