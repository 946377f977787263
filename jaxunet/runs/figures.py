"""What a person looks at: learning curves, tables of predictions, contours on pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from jaxunet.config import IGNORED
from jaxunet.runs.canvas import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Axes,
    ConstrainedLayoutEngine,
    Figure,
    Line2D,
    MaxNLocator,
    finish,
    save,
    to_rgb,
    with_own_settings,
)

TRUTH, PREDICTION = SKY, YELLOW
OUTLINES = (("ground truth", TRUTH, 3.0), ("prediction", PREDICTION, 1.1))

Picture = UInt8[np.ndarray, "height width 3"]
Mask = UInt8[np.ndarray, "height width"] | Bool[np.ndarray, "height width"]


@dataclass(frozen=True)
class PredictionRow:
    """One image of the table that `predictions` draws."""

    name: str
    """Id of the image."""
    label: str
    """Which one it is: `best`, `median`, ... (see `select_rows`)."""
    dice: float
    image: UInt8[np.ndarray, "height width 3"]
    truth: UInt8[np.ndarray, "height width"]
    """Lesion where above 0."""
    prediction: UInt8[np.ndarray, "height width"]
    """Lesion where above 0."""


def select_rows(dice: Float[np.ndarray, " images"]) -> list[tuple[int, str]]:
    """Choose six images to show: best, median and worst, the rest spread between them.

    The lower half gets one more: failures teach more than successes.

    Returns:
        Pairs of index into `dice` and label, from best to worst; of fewer images all.

    Raises:
        ValueError: a score is not finite.
    """
    if not np.isfinite(dice).all():
        raise ValueError(f"dice holds values that are not finite: {dice[~np.isfinite(dice)]}.")
    last = len(dice) - 1
    if last < 1:
        return [(index, "only image") for index in range(len(dice))]
    few, spread = np.linspace(1, 0, len(dice)), np.array([1, 3 / 4, 1 / 2, 1 / 3, 1 / 6, 0])
    quantiles = few if len(few) < len(spread) else spread
    order = np.argsort(-dice, kind="stable")  # best first; equal scores in dataset order
    middle = last // 2
    rows = []
    for rank in np.floor((1 - quantiles) * last + 0.499).astype(int):
        if rank in (0, last):
            label = "best" if rank == 0 else "worst"
        else:
            label = "median" if rank == middle else f"percentile {100 - 100 * rank / last:.0f}"
        rows.append((int(order[rank]), label))
    return rows


def overlay(image: Picture, mask: Mask, colour: str = YELLOW) -> Picture:
    """The picture with the mask's outline drawn on it.

    The line lies half inside and half outside the mask's edge, is closed where the mask
    touches the border, and widens with the picture: 1 pixel for each 256 of its longer
    side, at least 2.

    Args:
        image: the picture; left as it is.
        mask: lesion where above 0.
        colour: any colour that matplotlib knows.
    """
    lesion = mask > 0
    reach = max(1, round(max(lesion.shape) / 512))
    drawn = image.copy()
    rows, columns = np.flatnonzero(lesion.any(axis=1)), np.flatnonzero(lesion.any(axis=0))
    if not rows.size:
        return drawn
    # Filter only round the mask: it is often a small part of a large picture.
    box = tuple(
        slice(max(0, places[0] - reach), places[-1] + reach + 1) for places in (rows, columns)
    )
    inside = lesion[box].astype(np.uint8)
    grown, shrunk = _spread(inside, reach, outside=0), 1 - _spread(1 - inside, reach, outside=1)
    drawn[box][grown > shrunk] = np.round(np.array(to_rgb(colour)) * 255)
    return drawn


def _spread(
    mask: UInt8[np.ndarray, "height width"], reach: int, outside: int
) -> UInt8[np.ndarray, "height width"]:
    """Each pixel's largest value within `reach` rows and columns; `outside` beyond the edge."""
    padded = np.pad(mask, reach, constant_values=outside)
    for axis in (0, 1):
        padded = sliding_window_view(padded, 2 * reach + 1, axis).max(-1)
    return padded


@with_own_settings
def curves(metrics_lines: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and validation scores of a run to the PNG file `path`.

    Args:
        metrics_lines: the objects of `metrics.jsonl`, in order. Lines of split `train` are
            read for `values["loss"]`, those of `validation` for `loss`, `dice` and `iou`;
            what a line lacks is not drawn.
        path: where the picture goes; its folder is made.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss_axes, score_axes = figure.subplots(1, 2)

    steps, losses, epochs = _series(metrics_lines, "train", "loss")
    if losses.size:
        loss_axes.plot(
            steps, losses, color=BLUE, alpha=0.3, linewidth=0.8, label="training, logged steps"
        )
        _, epoch, count = np.unique(epochs, return_inverse=True, return_counts=True)
        middles, means = (np.bincount(epoch, x) / count for x in (steps, losses))
        _plot(loss_axes, middles, means, BLUE, "training, mean of epoch")
    steps, losses, _ = _series(metrics_lines, "validation", "loss")
    _plot(loss_axes, steps, losses, VERMILLION, "validation, end of epoch")
    finish(loss_axes, "Loss", "step", "loss")

    for name, title, colour in (("dice", "Dice", GREEN), ("iou", "IoU", PURPLE)):
        _, scores, epochs = _series(metrics_lines, "validation", name)
        if scores.size:
            best = int(scores.argmax())
            label = f"{title}, best {scores[best]:.4f} in epoch {epochs[best]:g}"
            _plot(score_axes, epochs, scores, colour, label)
            score_axes.plot(
                epochs[best], scores[best], "*", color=colour, markersize=12, zorder=3
            )
            score_axes.set_xlim(0.5, epochs.max() + 0.5)
    score_axes.set_ylim(0, 1)
    score_axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    finish(score_axes, "Validation, mean over images", "epoch", "score")
    save(figure, path)


@with_own_settings
def loss_comparison(curves: dict[str, list[float]], path: Path, title: str) -> None:
    """Draw loss curves of several frameworks over each other to the PNG file `path`.

    On the left the first steps as they are, on the right all of them as running means.
    Later curves are thinner and dashed, so that those that coincide can all be seen.

    Args:
        curves: losses of every step by the name that the legend gives them.
        path: where the picture goes; its folder is made.
        title: heading of the picture.
    """
    first = 60
    longest = max(map(len, curves.values()), default=0)
    window = max(1, longest // 25)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    colours = (SKY, VERMILLION, BLACK, GREEN, PURPLE, ORANGE)
    styles = ("-", "--", ":", "-.")
    for place, (name, losses) in enumerate(curves.items()):
        means = np.convolve(losses, np.full(window, 1 / window), "valid")
        for axes, values, start in ((left, losses[:first], 1), (right, means, window)):
            axes.plot(
                np.arange(start, start + len(values)),
                values,
                color=colours[place % len(colours)],
                linestyle=styles[place % len(styles)],
                linewidth=3.5 if place == 0 else 1.5,
                label=name,
            )
    finish(left, f"the first {min(first, longest)} steps", "step", "loss")
    finish(right, f"mean of {window} steps", "step", "loss")
    save(figure, path)


@with_own_settings
def predictions(rows: list[PredictionRow], path: Path, title: str) -> None:
    """Draw the table image | ground truth | prediction | overlay to the PNG file `path`.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("rows is empty, but a table of predictions needs at least one.")
    figure = Figure(
        figsize=(9.2, 2.07 * len(rows) + 0.9),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03),
    )
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes, heading in zip(
        grid[0], ("image", "ground truth", "prediction", "overlay"), strict=True
    ):
        axes.set_title(heading, fontsize=11)
    for line, row in zip(grid, rows, strict=True):
        line[0].imshow(row.image)
        truth = np.where(row.truth == IGNORED, 0.5, row.truth > 0)  # grey: does not count
        line[1].imshow(truth, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[2].imshow(row.prediction > 0, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        outlined(line[3], row)
        line[0].set_ylabel(
            f"{row.label}\nDice {row.dice:.3f}\n{row.name}",
            rotation=0,
            ha="right",
            va="center",
            labelpad=8,
            fontsize=9,
        )
        for axes in line:
            axes.set(xticks=[], yticks=[])
    explain_outlines(figure)
    save(figure, path)


@with_own_settings
def gallery(rows: list[PredictionRow], path: Path, title: str) -> None:
    """Draw every row's picture with both outlines, four side by side, to the PNG `path`."""
    lines = -(-len(rows) // 4)
    figure = Figure(figsize=(9.2, 2.5 * lines + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(lines, 4, squeeze=False).ravel()
    for axes in grid[len(rows) :]:
        axes.axis("off")
    for axes, row in zip(grid, rows, strict=False):  # the last line may be shorter
        outlined(axes, row)
        axes.set_title(f"{row.name}\nDice {row.dice:.3f}", fontsize=8)
    explain_outlines(figure)
    save(figure, path)


def outlined(axes: Axes, row: PredictionRow) -> None:
    """The picture, and on it the outlines of the truth and of the prediction."""
    axes.imshow(row.image)
    for mask, (_, colour, width) in zip((row.truth, row.prediction), OUTLINES, strict=True):
        _contour(axes, mask, colour, width)
    axes.set(xticks=[], yticks=[])


def explain_outlines(figure: Figure) -> None:
    """The legend of `outlined`, below the figure."""
    figure.legend(
        handles=[
            Line2D([], [], color=colour, linewidth=width, label=label)
            for label, colour, width in OUTLINES
        ],
        loc="outside lower right",
        ncols=2,
        facecolor="0.3",
        labelcolor="white",
        fontsize=9,
    )


def _series(
    metrics_lines: list[dict[str, Any]], split: str, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, values and epochs of one quantity of one split."""
    lines = [
        (line["step"], line["values"][name], line["epoch"])
        for line in metrics_lines
        if line["split"] == split and name in line["values"]
    ]
    steps, values, epochs = np.array(lines, dtype=np.float64).reshape(-1, 3).T
    return steps, values, epochs


def _plot(axes: Axes, x: Any, y: Any, colour: str, label: str) -> None:
    """A line with a dot at each value, where there are few enough to tell apart."""
    if len(x):
        marker = "o" if len(x) <= 25 else None
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)


def _contour(axes: Axes, mask: np.ndarray, colour: str, width: float) -> None:
    """The mask's outline, closed where it touches the border; none for an empty mask."""
    lesion = (mask > 0) & (mask != IGNORED)
    if lesion.any():
        framed = np.pad(lesion.astype(np.float32), 1)
        rows, columns = (np.arange(-1, side + 1) for side in mask.shape)
        drawn = axes.contour(
            columns, rows, framed, [0.5], colors=colour, linewidths=width, zorder=3
        )
        drawn.set_clip_on(False)  # a line along the border lies half outside
        axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))
