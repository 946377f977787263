"""Arguments of the losses that training leaves at their defaults, against hand counts."""

import jax.numpy as jnp
import pytest

from jaxunet.learning.losses import dice, focal, jaccard, tversky

# Probabilities 1, 1, 0, 0 against truth 1, 0, 1, 0: TP 1, FP 1, FN 1.
LOGITS = jnp.array([100.0, 100.0, -100.0, -100.0]).reshape(1, 2, 2, 1)
MASK = jnp.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 2, 2, 1)


@pytest.mark.parametrize(
    ("loss", "smooth", "expected"),
    [
        (dice, 0.0, 1 - 2 / 4),
        (dice, 3.0, 1 - 5 / 7),
        (jaccard, 0.0, 1 - 1 / 3),
        (jaccard, 3.0, 1 - 4 / 6),
    ],
)
def test_smoothing_enters_as_the_docstrings_say(loss, smooth, expected):
    assert loss(LOGITS, MASK, smooth)[0] == pytest.approx(expected)
    assert loss(LOGITS, MASK, smooth=smooth)[0] == pytest.approx(expected)


def test_tversky_weighs_missed_lesion_more_by_default():
    assert tversky(LOGITS, MASK, smooth=0.0)[0] == pytest.approx(1 - 1 / (1 + 0.3 + 0.7))
    only_missed = jnp.array([100.0, -100.0, -100.0, -100.0]).reshape(1, 2, 2, 1)
    only_added = jnp.array([100.0, 100.0, 100.0, -100.0]).reshape(1, 2, 2, 1)
    assert tversky(only_missed, MASK, smooth=0.0)[0] == pytest.approx(1 - 1 / 1.7)
    assert tversky(only_added, MASK, smooth=0.0)[0] == pytest.approx(1 - 2 / 2.3)


def test_focal_loss_of_gamma_0_is_cross_entropy_and_2_is_its_default():
    half = jnp.zeros((1, 2, 2, 1))
    assert focal(half, MASK, gamma=0.0)[0] == pytest.approx(0.6931472)
    assert focal(half, MASK)[0] == pytest.approx(0.25 * 0.6931472)
