"""Scores of binary masks, all from four counts an image.

The counts are taken on the device; every score is computed from them on the host in
float64. Protocols differ only in how the counts are pooled before scoring.

Where a ratio is undefined it is 1, as in the challenge's own scorer
(isic-challenge-scoring 5.6.0): Dice and IoU of an empty prediction of an empty truth,
sensitivity of an empty truth, specificity of a full one.
"""

from types import EllipsisType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

THRESHOLD_JACCARD = 0.65  # an image's IoU below this counts 0 in the ISIC 2018 challenge
REFERENCE_BATCH = 4  # images whose pixels the reference pools before it scores them
POOLED = ("dice", "iou")  # what is scored of pooled counts

Counts = Int[np.ndarray, "images 4"]


def confusion_counts(
    prediction: Bool[Array, "batch height width 1"],
    truth: Bool[Array, "batch height width 1"],
    counted: Bool[Array, "batch height width 1"] | None = None,
) -> Int[Array, "batch 4"]:
    """True positives, false positives, false negatives, true negatives of each image: int32.

    Of the pixels that `counted` marks; none: of all.
    """
    pairs = (
        prediction & truth,
        prediction & ~truth,
        ~prediction & truth,
        ~prediction & ~truth,
    )
    return jnp.stack(
        [jnp.sum(p, (1, 2, 3), dtype=jnp.int32, where=counted) for p in pairs], axis=-1
    )


def count(
    prediction: Bool[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    counted: Bool[np.ndarray, "height width"] | EllipsisType = ...,
) -> Int[np.ndarray, " 4"]:
    """`confusion_counts` of one image, on the host: int64; an ellipsis is all pixels."""
    both = np.bincount((2 * truth + prediction)[counted].ravel(), minlength=4)
    return both[[3, 1, 2, 0]]


def _ratio(
    part: Float[np.ndarray, " images"], whole: Float[np.ndarray, " images"]
) -> Float[np.ndarray, " images"]:
    return np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)


def per_image(counts: Counts) -> dict[str, Float[np.ndarray, " images"]]:
    """Every score of each row of counts.

    With true and false positives and negatives TP, FP, TN, FN: `dice` 2TP/(2TP+FP+FN),
    `iou` TP/(TP+FP+FN), `threshold_jaccard` the IoU, or 0 where it is below 0.65,
    `accuracy` (TP+TN)/all, `sensitivity` TP/(TP+FN), `specificity` TN/(TN+FP).
    """
    hit, false_positive, false_negative, rejected = counts.astype(np.float64).T
    iou = _ratio(hit, hit + false_positive + false_negative)
    return {
        "dice": _ratio(2 * hit, 2 * hit + false_positive + false_negative),
        "iou": iou,
        "threshold_jaccard": np.where(iou >= THRESHOLD_JACCARD, iou, 0.0),
        "accuracy": (hit + rejected) / counts.sum(axis=1),
        "sensitivity": _ratio(hit, hit + false_negative),
        "specificity": _ratio(rejected, rejected + false_positive),
    }


def pooled_counts(counts: Counts) -> dict[str, Int[np.ndarray, "pools 4"]]:
    """The counts as the protocols pool them that score several images as one; see `scores`."""
    starts = np.arange(0, len(counts), REFERENCE_BATCH)
    return {
        "batch_of_4": np.add.reduceat(counts, starts, axis=0),
        "pooled": counts.sum(axis=0, keepdims=True),
    }


def scores(counts: Counts) -> dict[str, dict[str, float]]:
    """The scores of a split under each protocol.

    Args:
        counts: of each image, in the dataset's order.

    Returns:
        `per_image`: means over images of every score. `batch_of_4`: Dice and IoU pooled
        over the pixels of each four consecutive images, mean over these batches (the last
        may be smaller), which is the reference's protocol. `pooled`: Dice and IoU over all
        pixels of the split together.
    """
    result = {"per_image": {k: float(v.mean()) for k, v in per_image(counts).items()}}
    for protocol, pooled in pooled_counts(counts).items():
        values = per_image(pooled)
        result[protocol] = {name: float(values[name].mean()) for name in POOLED}
    return result
