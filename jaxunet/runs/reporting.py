"""What a finished run leaves, and the pictures of it: of what it logged and how it scored."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxunet.config import Config
from jaxunet.data.images import resize_image, resize_mask
from jaxunet.data.reader import DataSource
from jaxunet.devices.tuning import eval_batch_size
from jaxunet.files import write_json
from jaxunet.learning.metrics import per_image
from jaxunet.learning.steps import TrainState
from jaxunet.runs import figures
from jaxunet.runs.loading import Masks
from jaxunet.runs.model_card import write_card
from jaxunet.runs.record import read_metrics


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the final state on the host, summary.json, pictures."""

    state: TrainState
    summary: dict[str, Any]
    pictures: list[Path]


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json` and `MODEL_CARD.md` under `run`."""
    write_json(run / "summary.json", summary)
    write_card(run)


def write_figures(
    run: Path,
    masks: Masks,
    counts: np.ndarray,
    source: DataSource,
    config: Config,
    summary: Mapping[str, Any],
) -> list[Path]:
    """Draw `figures/curves.png` and `figures/predictions.png` under `run`.

    Args:
        masks: see `jaxunet.runs.loading.compile_masks`.
        counts: [images, 4], of `source` in its order; they choose the best, the median and
            the worst image to show.

    Returns:
        The files written. One that can't be drawn is none of them: the run is done, and a
        line on stderr says why.
    """
    curves, predictions = run / "figures" / "curves.png", run / "figures" / "predictions.png"
    lines = read_metrics(run / "metrics.jsonl")
    written = drawn(curves, partial(figures.curves, lines, curves))

    chosen = figures.select_rows(per_image(counts)["dice"])
    rows = prediction_rows(chosen, masks, counts, source, config)
    title = (
        "{dataset[name]} {dataset[split]}, after {epoch} epochs: "
        "mean Dice {scores[per_image][dice]:.3f}"
    ).format_map(summary)
    return written + drawn(predictions, partial(figures.predictions, rows, predictions, title))


def prediction_rows(
    chosen: Sequence[tuple[int, str]],
    masks: Masks,
    counts: np.ndarray,
    source: DataSource,
    config: Config,
) -> list[figures.PredictionRow]:
    """The rows of `figures.predictions` for `chosen` examples: indices of `source`, labels.

    The others are as in `write_figures`.
    """
    image_size = config.data.image_size
    batch_size = eval_batch_size(config.train)
    dice = per_image(counts)["dice"]
    examples = [source[index] for index, _ in chosen]
    images = [resize_image(e["image"], image_size, image_size) for e in examples]
    truths = [resize_mask(e["mask"], image_size, image_size) for e in examples]
    rows = []
    for start in range(0, len(chosen), batch_size):
        batch = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
        part = images[start : start + batch_size]
        batch[: len(part)] = part
        for place, prediction in enumerate(masks(batch)[: len(part)], start):
            index, label = chosen[place]
            rows.append(
                figures.PredictionRow(
                    name=examples[place]["id"],
                    label=label,
                    dice=float(dice[index]),
                    image=images[place],
                    truth=truths[place][:, :, 0],
                    prediction=prediction.astype(np.uint8),
                )
            )
    return rows


def drawn(path: Path, draw: Callable[[], None]) -> list[Path]:
    """[`path`], once `draw` has drawn it; if it can't be, nothing, and a line on stderr."""
    try:
        draw()
    except Exception as error:  # of matplotlib, of fonts, of memory, of the disk
        reason = (str(error).splitlines() or [""])[0]
        print(f"note: {path} is not drawn: {type(error).__name__}: {reason}", file=sys.stderr)
        return []
    return [path]
