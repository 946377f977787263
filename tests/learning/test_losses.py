import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxunet.learning.losses import LOSSES, dice, focal, jaccard, lesion_logits, lovasz, tversky

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (3, 6, 5, 1)).astype(np.float32)
MASK = (RNG.random((3, 6, 5, 1)) < 0.4).astype(np.float32)


def theirs(name: str, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The losses of one image as PyTorch users know them (SMP's, with our smoothing)."""
    p = logits.sigmoid()
    hit, fp, fn = (p * mask).sum(), (p * (1 - mask)).sum(), ((1 - p) * mask).sum()
    bce = F.binary_cross_entropy_with_logits(logits, mask)
    soft_dice = 1 - (2 * hit + 1) / (p.sum() + mask.sum() + 1)
    if name == "focal":
        elements = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        return ((1 - torch.exp(-elements)) ** 2 * elements).mean()
    if name == "lovasz":
        errors = 1 - logits.flatten() * (2 * mask.flatten() - 1)
        errors, order = torch.sort(errors, descending=True)
        truth = mask.flatten()[order]
        union = truth.sum() + (1 - truth).cumsum(0)
        curve = 1 - (truth.sum() - truth.cumsum(0)) / union
        steps = torch.cat([curve[:1], curve[1:] - curve[:-1]])
        return (F.relu(errors) * steps).sum()
    return {
        "bce": bce,
        "dice": soft_dice,
        "bce_dice": bce + soft_dice,
        "jaccard": 1 - (hit + 1) / (p.sum() + mask.sum() - hit + 1),
        "tversky": 1 - (hit + 1) / (hit + 0.3 * fp + 0.7 * fn + 1),
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_pytorchs(name):
    found = LOSSES[name](jnp.asarray(LOGITS), jnp.asarray(MASK))
    logits = torch.tensor(LOGITS, requires_grad=True)
    expected = torch.stack(
        [theirs(name, x, y) for x, y in zip(logits, torch.tensor(MASK), strict=True)]
    )
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    expected.sum().backward()
    grad = jax.grad(lambda x: LOSSES[name](x, jnp.asarray(MASK)).sum())(jnp.asarray(LOGITS))
    np.testing.assert_allclose(grad, logits.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, -100.0])
def test_empty_and_full_masks_and_large_logits_give_finite_losses_and_gradients(name, scale):
    logits = jnp.full((2, 4, 4, 1), scale)
    masks = jnp.stack([jnp.zeros((4, 4, 1)), jnp.ones((4, 4, 1))])
    loss, grad = jax.value_and_grad(lambda x: LOSSES[name](x, masks).sum())(logits)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much(name):
    mask = jnp.asarray(MASK)
    assert LOSSES[name](100 * (2 * mask - 1), mask) == pytest.approx(0, abs=1e-5)
    assert (LOSSES[name](100 * (1 - 2 * mask), mask) > 0.8).all()


def test_overlap_losses_counted_by_hand():
    # Probabilities 1, 1, 0, 0 against truth 1, 0, 1, 0: TP 1, FP 1, FN 1.
    logits = jnp.array([100.0, 100.0, -100.0, -100.0]).reshape(1, 2, 2, 1)
    mask = jnp.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 2, 2, 1)
    assert dice(logits, mask)[0] == pytest.approx(1 - 3 / 5)
    assert jaccard(logits, mask)[0] == pytest.approx(1 - 2 / 4)
    assert tversky(logits, mask, 0.25, 0.5)[0] == pytest.approx(1 - 2 / 2.75)


def test_lovasz_of_a_hard_prediction_is_twice_the_jaccard_loss():
    # Logits of ±1 make every hinge error 0 or 2, where the extension meets the set function.
    truth = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)
    prediction = np.array([1, 1, 0, 1, 0, 0, 0, 0], np.float32)
    logits = jnp.asarray(2 * prediction - 1).reshape(1, 2, 4, 1)
    found = lovasz(logits, jnp.asarray(truth).reshape(1, 2, 4, 1))
    assert found[0] == pytest.approx(2 * (1 - 2 / 4))


def test_focal_loss_with_alpha_weighs_the_classes():
    # torchvision's sigmoid_focal_loss: alpha for lesion, 1 - alpha for background.
    logits = jnp.zeros((1, 1, 2, 1))
    mask = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    one_pixel = 0.25 * np.log(2)
    expected = (0.75 * one_pixel + 0.25 * one_pixel) / 2
    assert focal(logits, mask, alpha=0.75)[0] == pytest.approx(expected)


def test_two_logits_become_one_whose_sigmoid_is_their_softmax():
    two = jnp.asarray(RNG.normal(size=(1, 2, 2, 2)), jnp.float32)
    one = lesion_logits(two)
    np.testing.assert_allclose(
        jax.nn.sigmoid(one[..., 0]), jax.nn.softmax(two)[..., 1], rtol=1e-5
    )
    np.testing.assert_array_equal(lesion_logits(one), one)
