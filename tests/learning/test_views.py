"""Averages over views, against NumPy's turns one by one."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxunet.learning.views import mean_logits

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(0, 0.02, (6, 6))
IMAGES = jnp.asarray(RNG.integers(0, 256, (2, 6, 6, 3)), jnp.uint8)
# Each as NumPy turns an image, and as it turns a map back.
FLIPS = [
    (lambda x: x, lambda x: x),
    (np.fliplr, np.fliplr),
    (np.flipud, np.flipud),
    (lambda x: np.rot90(x, 2), lambda x: np.rot90(x, 2)),
]
D4 = [
    *FLIPS,
    (lambda x: np.rot90(x, 1), lambda x: np.rot90(x, 3)),
    (lambda x: np.rot90(x, 3), lambda x: np.rot90(x, 1)),
    (lambda x: np.swapaxes(x, 0, 1), lambda x: np.swapaxes(x, 0, 1)),
    (
        lambda x: np.rot90(np.swapaxes(x, 0, 1), 2),
        lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    ),
]


def network(images):
    """Depends on where a pixel lies, so that every view says something else."""
    return (jnp.float32(WEIGHTS) * (images.astype(jnp.float32).mean(-1) - 100))[..., None]


@pytest.mark.parametrize("views", ["none", "flips", "d4"])
def test_probabilities_are_averaged_over_numpys_turns(views):
    turns = {"none": FLIPS[:1], "flips": FLIPS, "d4": D4}[views]
    found = np.asarray(mean_logits([network], IMAGES, views))[..., 0]
    for image, logits in zip(np.asarray(IMAGES), found, strict=True):
        views_of = [
            back(1 / (1 + np.exp(-WEIGHTS * (turn(image).astype(float).mean(-1) - 100))))
            for turn, back in turns
        ]
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), np.mean(views_of, 0), rtol=1e-5)


def test_certain_views_stay_finite_and_one_that_is_not_finite_is_seen():
    certain = mean_logits([lambda x: jnp.full((*x.shape[:3], 1), 300.0)], IMAGES, "d4")
    np.testing.assert_allclose(certain, 300)
    for value in (np.nan, np.inf, -np.inf):
        broken = partial(lambda x, value: network(x).at[0, 0, 0].set(value), value=value)
        found = mean_logits([broken], IMAGES, "flips")[0, ..., 0]
        assert np.isnan(found[[0, 0, -1, -1], [0, -1, 0, -1]]).all()
        assert np.isfinite(found).sum() == 32
