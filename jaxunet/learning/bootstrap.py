"""How far a split's scores would move with other images of the same kind: the bootstrap.

As many images as a split has are drawn from it with replacement, many times over; the middle
95% of such draws' scores are the percentile interval (Efron and Tibshirani 1993, chapter 13).
It knows nothing of other seeds, nor of another hospital's pictures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from jaxunet.learning.calibration import Bins, calibration_error
from jaxunet.learning.metrics import POOLED, Counts, per_image, pooled_counts

LEVEL = 0.95
DRAWS = 2000
_AT_ONCE = 100  # draws: bounds the memory that a large split takes

Interval = list[float]
"""Low and high end."""
Rows = Num[np.ndarray, "units values"]


def mean_intervals(values: dict[str, Float[np.ndarray, " units"]]) -> dict[str, Interval]:
    """The interval of the mean of each of `values`, over the same draws of units.

    The same values always have the same intervals.
    """
    rows = np.stack(list(values.values()), axis=1)
    return intervals_of(rows, list(values), lambda totals: totals / len(rows))


def intervals(counts: Counts) -> dict[str, dict[str, Interval]]:
    """The interval of every score of `jaxunet.learning.metrics.scores`: low and high.

    `batch_of_4` draws batches, as they are what that protocol takes the mean over.
    """
    batches = per_image(pooled_counts(counts)["batch_of_4"])

    def pooled(totals: Float[np.ndarray, "draws 4"]) -> Float[np.ndarray, "draws scores"]:
        found = per_image(totals.astype(np.int64))  # whole, and exact in float64
        return np.stack([found[name] for name in POOLED], axis=1)

    return {
        "per_image": mean_intervals(per_image(counts)),
        "batch_of_4": mean_intervals({name: batches[name] for name in POOLED}),
        "pooled": intervals_of(counts, POOLED, pooled),
    }


def calibration_intervals(bins: dict[str, Bins]) -> dict[str, Interval]:
    """The interval of each expected calibration error of the same images' `bins`, which
    `jaxunet.learning.calibration.reliability` gives, and of its difference to the first's."""
    names, shape = list(bins), next(iter(bins.values())).shape
    rows = np.concatenate([each.reshape(shape[0], -1) for each in bins.values()], axis=1)

    def errors(totals: Float[np.ndarray, "draws values"]) -> Float[np.ndarray, "draws errors"]:
        found = calibration_error(totals.reshape(-1, len(names), *shape[1:]))
        return np.concatenate([found, found - found[:, :1]], axis=1)

    return intervals_of(rows, [*names, *(f"{name} less {names[0]}" for name in names)], errors)


def intervals_of(
    rows: Rows, names: Sequence[str], statistic: Callable[[Any], Any]
) -> dict[str, Interval]:
    """The middle `LEVEL` of `statistic` of the sums of drawn rows."""
    rng, units = np.random.default_rng(0), len(rows)
    drawn = (
        rng.multinomial(units, np.full(units, 1 / units), _AT_ONCE).astype(np.float64)
        for _ in range(0, DRAWS, _AT_ONCE)
    )
    found = np.concatenate([statistic(times @ rows) for times in drawn])
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}
