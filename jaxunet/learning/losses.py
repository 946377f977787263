"""Losses for binary masks: from logits and a 0/1 mask to one value for each example.

Each is of the pixels that `counted` marks (none: of all), and 0 where there are none; from
other pixels, whatever is there, comes no gradient. As `ignore_index` of PyTorch's losses,
which take the mean over the batch's pixels.

A value an example, not one a batch, makes weighting exact and keeps sharding from changing
what is computed. segmentation_models_pytorch (SMP) pools its overlap losses over the batch
instead: the two agree for one example, and SMP's per-image options agree always.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

Logits = Float[Array, "batch height width 1"]
Mask = Float[Array, "batch height width 1"]
PerExample = Float[Array, " batch"]
Counted = Bool[Array, "batch height width 1"]


@runtime_checkable
class LossFn(Protocol):
    """What `LOSSES` holds."""

    def __call__(
        self, logits: Logits, mask: Mask, *, counted: Counted | None = None
    ) -> PerExample: ...


_PIXELS = (1, 2, 3)


def lesion_logits(
    logits: Float[Array, "batch height width classes"],
) -> Float[Array, "batch height width 1"]:
    """One logit a pixel from one or two: softmax over two is sigmoid of their difference."""
    if logits.shape[-1] == 1:
        return logits
    background, lesion = jnp.split(logits, 2, axis=-1)
    return lesion - background


def _blank(logits: Logits, mask: Mask, counted: Counted | None) -> tuple[Logits, Mask]:
    """0 in place of what does not count: not even an infinite logit there has a gradient."""
    if counted is None:
        return logits, mask
    return jnp.where(counted, logits, 0), jnp.where(counted, mask, 0)


def _mean(losses: Float[Array, "batch height width 1"], counted: Counted | None) -> PerExample:
    if counted is None:
        return losses.mean(_PIXELS)
    pixels = jnp.sum(counted, _PIXELS, dtype=jnp.float32)
    return jnp.sum(losses, _PIXELS, where=counted) / jnp.maximum(pixels, 1)


def bce(logits: Logits, mask: Mask, *, counted: Counted | None = None) -> PerExample:
    """Binary cross-entropy from logits, mean over pixels (`torch.nn.BCEWithLogitsLoss`)."""
    logits, mask = _blank(logits, mask, counted)
    return _mean(optax.sigmoid_binary_cross_entropy(logits, mask), counted)


def _overlap(
    logits: Logits, mask: Mask, counted: Counted | None
) -> tuple[PerExample, PerExample, PerExample]:
    """Soft true positives, false positives and false negatives."""
    logits, mask = _blank(logits, mask, counted)
    probability = jax.nn.sigmoid(logits)
    hit = jnp.sum(probability * mask, _PIXELS)  # a mask is 0 where nothing counts
    return (
        hit,
        jnp.sum(probability * (1 - mask), _PIXELS, where=counted),
        jnp.sum((1 - probability) * mask, _PIXELS),
    )


def tversky(
    logits: Logits,
    mask: Mask,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
    *,
    counted: Counted | None = None,
) -> PerExample:
    """`1 - (TP + s) / (TP + alpha FP + beta FN + s)` (Salehi et al. 2017, arXiv:1706.05721).

    `beta > alpha` weighs missed lesion more. SMP's `TverskyLoss` has alpha = beta = 0.5 and
    s = 0 by default, and scores an empty mask 0.
    """
    hit, false_positive, false_negative = _overlap(logits, mask, counted)
    return 1 - (hit + smooth) / (hit + alpha * false_positive + beta * false_negative + smooth)


def dice(
    logits: Logits, mask: Mask, smooth: float = 1.0, *, counted: Counted | None = None
) -> PerExample:
    """Soft Dice: `1 - (2 TP + s) / (2 TP + FP + FN + s)` (Milletari et al. 2016).

    Sums of probabilities, not of their squares, as in SMP's `DiceLoss`, whose default is
    s = 0 and which scores an empty mask 0; s = 1 keeps a gradient there.
    """
    return tversky(logits, mask, 0.5, 0.5, smooth / 2, counted=counted)


def jaccard(
    logits: Logits, mask: Mask, smooth: float = 1.0, *, counted: Counted | None = None
) -> PerExample:
    """Soft Jaccard: `1 - (TP + s) / (TP + FP + FN + s)`; SMP's `JaccardLoss` has s = 0."""
    return tversky(logits, mask, 1.0, 1.0, smooth, counted=counted)


def bce_dice(logits: Logits, mask: Mask, *, counted: Counted | None = None) -> PerExample:
    """Binary cross-entropy plus soft Dice."""
    return bce(logits, mask, counted=counted) + dice(logits, mask, counted=counted)


def focal(
    logits: Logits,
    mask: Mask,
    alpha: float | None = None,
    gamma: float = 2.0,
    *,
    counted: Counted | None = None,
) -> PerExample:
    """`-(1 - p_t)^gamma log p_t`, mean over pixels (Lin et al. 2017, arXiv:1708.02002).

    As SMP's `FocalLoss` and, with `alpha`, torchvision's `sigmoid_focal_loss`.
    """
    logits, mask = _blank(logits, mask, counted)
    return _mean(optax.sigmoid_focal_loss(logits, mask, alpha=alpha, gamma=gamma), counted)


def lovasz(logits: Logits, mask: Mask, *, counted: Counted | None = None) -> PerExample:
    """Lovász hinge for each image (Berman et al. 2018, arXiv:1705.08790, algorithm 1).

    The convex extension of the Jaccard loss; SMP's `LovaszLoss("binary", per_image=True)`.
    """

    logits, mask = _blank(logits, mask, counted)

    def one(
        logit: Float[Array, " pixels"],
        truth: Float[Array, " pixels"],
        counts: Bool[Array, " pixels"] | None,
    ) -> Float[Array, ""]:
        errors = 1 - logit * (2 * truth - 1)
        if counts is not None:  # last, where it changes nobody's gradient and has none
            errors = jnp.where(counts, errors, -jnp.inf)
        order = jnp.argsort(-errors)
        sorted_truth = truth[order]
        total = sorted_truth.sum()
        intersection = total - jnp.cumsum(sorted_truth)
        union = total + jnp.cumsum(1 - sorted_truth)
        loss = 1 - intersection / union
        gradient = jnp.diff(loss, prepend=0.0)
        return jnp.sum(jax.nn.relu(errors[order]) * jax.lax.stop_gradient(gradient))

    batch = len(logits)
    counts = None if counted is None else counted.reshape(batch, -1)
    return jax.vmap(one)(logits.reshape(batch, -1), mask.reshape(batch, -1), counts)


LOSSES: dict[str, LossFn] = {
    "bce": bce,
    "dice": dice,
    "bce_dice": bce_dice,
    "jaccard": jaccard,
    "focal": focal,
    "tversky": tversky,
    "lovasz": lovasz,
}
