"""Whether probabilities mean what they say, and the threshold and temperature that serve best.

All is computed on the host, in float64, from tables that are added up over images: a split of
any size takes one pass and little memory.
"""

from types import EllipsisType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxunet.learning.metrics import Counts, per_image

Maps = Float[np.ndarray, "images height width"]
Truth = Bool[np.ndarray, "images height width"]
Counted = Bool[np.ndarray, "images height width"] | EllipsisType
"""Which pixels count; an ellipsis is all."""
Bins = Float[np.ndarray, "images bins 3"]

BINS = 15  # of equal width, from 0 to 1: as many as torchmetrics and most papers take
THRESHOLDS = np.arange(1, 100) / 100
TEMPERATURES = (0.05, 20.0)
"""Within these a temperature is looked for: beyond, probabilities are as good as 0 and 1, or
all alike."""

_WIDTH, _END = 1 / 64, 64.0  # of the cells that logits are counted in, and their end
_CELLS = round(2 * _END / _WIDTH)

LogitTable = Float[np.ndarray, "2 2 cells"]
ThresholdTable = Int[np.ndarray, "images levels 2"]


def reliability(probabilities: Maps, truth: Truth, counted: Counted = ...) -> Bins:
    """Pixels of each image by predicted probability, in `BINS` bins of equal width.

    A bin holds its lower edge, the last one 1 too.

    Returns:
        For each bin the number of pixels, the sum of their probabilities, and how many of
        them are lesion.
    """
    images = len(probabilities)
    cell = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    cell += BINS * np.arange(images)[:, None, None]
    cell = cell[counted].ravel()
    sums = [
        np.bincount(cell, weights, minlength=images * BINS)
        for weights in (None, probabilities[counted].ravel(), truth[counted].ravel())
    ]
    return np.stack(sums, axis=-1).reshape(images, BINS, 3).astype(np.float64)


def calibration_error(bins: Float[np.ndarray, "... bins 3"]) -> Float[np.ndarray, "..."]:
    """The expected calibration error of bins as `reliability` gives them, summed over images.

    The mean over pixels of how far the mean probability of a pixel's bin lies from the share
    of lesion in it (Naeini et al. 2015, with probabilities of the one class; torchmetrics'
    `BinaryCalibrationError`).
    """
    pixels, probability, lesion = np.moveaxis(bins, -1, 0)
    return np.asarray(np.abs(probability - lesion).sum(-1) / pixels.sum(-1))


def cross_entropy(
    logits: Maps, truth: Truth, temperature: float = 1, counted: Counted = ...
) -> Float[np.ndarray, " images"]:
    """Binary cross-entropy of each image, mean over pixels, with logits over `temperature`."""
    wrong = np.where(truth, -logits.astype(np.float64), logits) / temperature
    where = True if isinstance(counted, EllipsisType) else counted
    return np.logaddexp(0, wrong).mean(axis=(1, 2), where=where)


def count_logits(logits: Maps, truth: Truth, counted: Counted = ...) -> LogitTable:
    """How many pixels have which logit; tables of several batches are added.

    Returns:
        [not lesion or lesion, number of pixels or sum of logits, cell]. Cells are 1/64 wide.
    """
    values = logits[counted].ravel().astype(np.float64)
    cell = np.clip((values + _END) / _WIDTH, 0, _CELLS - 1).astype(np.int64)
    cell += _CELLS * truth[counted].ravel()
    sums = [np.bincount(cell, w, minlength=2 * _CELLS) for w in (None, values)]
    return np.stack(sums).reshape(2, 2, _CELLS).swapaxes(0, 1).astype(np.float64)


def fit_temperature(table: LogitTable) -> float:
    """The temperature whose sigmoid(logit / temperature) has the least cross-entropy.

    Guo et al. 2017, arXiv:1706.04599. The cross-entropy is convex in 1 / temperature, so the
    root of its slope is sought; each cell of the table stands for its mean logit. Where the
    least lies beyond `TEMPERATURES`, as it does if every pixel is right, the nearer end.
    """
    from scipy.optimize import brentq  # late: it takes most of a second
    from scipy.special import expit

    (_, outside_sum), (_, lesion_sum) = table
    means = [np.divide(s, n, out=np.zeros_like(s), where=n > 0) for n, s in table]

    def slope(factor: float) -> float:
        rises = outside_sum @ expit(factor * means[0])
        return float(rises - lesion_sum @ expit(-factor * means[1]))

    coldest, hottest = TEMPERATURES
    if slope(1 / coldest) <= 0:
        return coldest
    if slope(1 / hottest) >= 0:
        return hottest
    return 1 / brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12)


def count_thresholds(
    probabilities: Maps, truth: Truth, counted: Counted = ...
) -> ThresholdTable:
    """How many pixels of each image exceed so many of `THRESHOLDS`: not lesion, and lesion."""
    images, levels = len(probabilities), len(THRESHOLDS) + 1
    exceeded = np.searchsorted(THRESHOLDS.astype(np.float32), probabilities)
    cell = 2 * (exceeded + levels * np.arange(images)[:, None, None]) + truth
    found = np.bincount(cell[counted].ravel(), minlength=2 * images * levels)
    return found.reshape(images, levels, 2)


def counts_by_threshold(table: ThresholdTable) -> Int[np.ndarray, "thresholds images 4"]:
    """The counts of `jaxunet.learning.metrics` that each of `THRESHOLDS` would give."""
    above = table[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    false_positive, hit = np.moveaxis(above, (2, 1), (0, 1))
    outside, lesion = table.sum(axis=1).T
    return np.stack([hit, false_positive, lesion - hit, outside - false_positive], axis=-1)


def best_threshold(table: ThresholdTable) -> tuple[float, Float[np.ndarray, " thresholds"]]:
    """The threshold with the highest mean Dice over images, and the Dice of each.

    Of several the one nearest to 0.5.
    """
    dice = np.array([mean_dice(counts) for counts in counts_by_threshold(table)])
    best = THRESHOLDS[dice == dice.max()]
    return float(best[np.argmin(np.abs(best - 0.5))]), dice


def mean_dice(counts: Counts) -> float:
    """Dice, the mean over images."""
    return float(per_image(counts)["dice"].mean())


def tempered(threshold: float, temperature: float) -> float:
    """The threshold for probabilities at `temperature` that gives the masks of `threshold`.

    A temperature changes no order: what exceeds the one without it exceeds the other with it.
    """
    if temperature == 1:
        return threshold
    odds = np.log(threshold) - np.log1p(-threshold)
    return float(1 / (1 + np.exp(-odds / temperature)))


def described(bins: Bins) -> dict[str, Any]:
    """The calibration of a split as a report holds it: the error, and what is in each bin."""
    total = bins.sum(axis=0)
    edges = np.linspace(0, 1, len(total) + 1)

    def mean(part: float, pixels: float) -> float | None:
        return part / pixels if pixels else None

    return {
        "expected_calibration_error": float(calibration_error(total)),
        "bins": [
            {
                "from": float(low),
                "to": float(high),
                "pixels": int(pixels),
                "mean_probability": mean(probability, pixels),
                "lesion_share": mean(lesion, pixels),
            }
            for low, high, (pixels, probability, lesion) in zip(
                edges[:-1], edges[1:], total.tolist(), strict=True
            )
        ],
    }
