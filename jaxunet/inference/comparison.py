"""Which of two models is better on the same images, and by how much: paired comparisons."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxunet.learning.bootstrap import mean_intervals
from jaxunet.learning.metrics import Counts, per_image
from jaxunet.runs.canvas import BLUE, Figure, finish, save, with_own_settings
from jaxunet.runs.figures import PredictionRow, explain_outlines, outlined

COMPARED = ("dice", "iou", "threshold_jaccard")


Scores = dict[str, Float[np.ndarray, " images"]]


def paired(one: Scores, other: Scores) -> dict[str, dict[str, Any]]:
    """Two models' scores of the same images, in the same order.

    Returns:
        For each score the means `first` and `second`; `difference`, the mean of first less
        second; and its 95% bootstrap `interval` over images.
    """
    differences = {name: one[name] - other[name] for name in one}
    between = mean_intervals(differences)
    return {
        name: {
            "first": float(one[name].mean()),
            "second": float(other[name].mean()),
            "difference": float(each.mean()),
            "interval": between[name],
        }
        for name, each in differences.items()
    }


def compared(counts: Counts) -> Scores:
    """`COMPARED` of each image."""
    return {name: per_image(counts)[name] for name in COMPARED}


def compare(first: Counts, second: Counts) -> dict[str, dict[str, Any]]:
    """Mean scores of two models on the same images, in the same order, and their difference.

    Returns:
        For each of `COMPARED` what `paired` gives, and `p` of Wilcoxon's signed-rank test,
        two-sided, that they do not differ (1 where no image does).
    """
    from scipy.stats import wilcoxon  # late: it takes most of a second

    one, other = compared(first), compared(second)
    found = paired(one, other)
    for name, entry in found.items():
        each = one[name] - other[name]
        entry["p"] = float(wilcoxon(each).pvalue) if each.any() else 1.0
    return found


def most_different(first: Counts, second: Counts, count: int) -> list[int]:
    """Indices of the images whose Dice differs most, the greatest difference first."""
    differences = np.abs(per_image(first)["dice"] - per_image(second)["dice"])
    return [int(i) for i in np.argsort(-differences, kind="stable")[:count]]


@with_own_settings
def draw(
    first: Counts,
    second: Counts,
    rows: list[tuple[PredictionRow, PredictionRow]],
    path: Path,
    names: tuple[str, str],
) -> None:
    """Dice of image against image, and both models' outlines on `rows`, to the PNG `path`."""
    lines = -(-len(rows) // 2)
    figure = Figure(figsize=(11, 4.6 + 2.9 * lines), layout="constrained")
    heights = [4.6, 2.9 * lines]
    top, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    scatter, histogram = top.subplots(1, 2)
    dice = [per_image(counts)["dice"] for counts in (first, second)]
    scatter.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    scatter.plot(dice[1], dice[0], ".", color=BLUE, alpha=0.6)
    finish(scatter, "Dice of each image", names[1], names[0])
    scatter.set_aspect("equal")
    histogram.hist(dice[0] - dice[1], bins=41, color=BLUE)
    histogram.axvline(0, color="0.6", linewidth=1)
    finish(histogram, "Difference of Dice", f"{names[0]} less {names[1]}", "images")
    grid = below.subplots(lines, 4, squeeze=False).ravel()
    for axes in grid[2 * len(rows) :]:
        axes.axis("off")
    for place, pair in enumerate(rows):
        for axes, row, name in zip(grid[2 * place :], pair, names, strict=False):
            outlined(axes, row)
            axes.set_title(f"{row.name}\n{name}: Dice {row.dice:.3f}", fontsize=8)
    explain_outlines(figure)
    save(figure, path)
