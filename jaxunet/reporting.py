"""The pictures of a finished run, drawn from what it logged and how it scored."""

from pathlib import Path

import numpy as np

from jaxunet import figures
from jaxunet.data.images import resize_image, resize_mask
from jaxunet.data.pipeline import Source
from jaxunet.metrics import per_image
from jaxunet.run import read_metrics
from jaxunet.trained import Probabilities


def write_figures(
    run: Path,
    probabilities: Probabilities,
    counts: np.ndarray,
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    threshold: float,
    title: str,
) -> list[Path]:
    """Draw `figures/curves.png` and `figures/predictions.png` under `run`.

    Args:
        probabilities: see `jaxunet.trained.compile_probabilities`.
        counts: [images, 4], of `source` in its order; they choose the best, the median and
            the worst image to show.
        batch_size: rows that `probabilities` is called with.

    Returns:
        The files written.
    """
    curves, predictions = run / "figures" / "curves.png", run / "figures" / "predictions.png"
    figures.curves(read_metrics(run / "metrics.jsonl"), curves)

    dice = per_image(counts)["dice"]
    chosen = figures.select_rows(dice)
    examples = [source[index] for index, _ in chosen]
    images = [resize_image(e["image"], image_size, image_size) for e in examples]
    masks = [resize_mask(e["mask"], image_size, image_size) for e in examples]
    rows = []
    for start in range(0, len(chosen), batch_size):
        batch = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
        part = images[start : start + batch_size]
        batch[: len(part)] = part
        predicted = probabilities(batch)[: len(part), :, :, 0] > threshold
        for place, prediction in enumerate(predicted, start):
            index, label = chosen[place]
            rows.append(
                figures.PredictionRow(
                    name=examples[place]["id"],
                    label=label,
                    dice=float(dice[index]),
                    image=images[place],
                    truth=masks[place][:, :, 0],
                    prediction=prediction.astype(np.uint8),
                )
            )
    figures.predictions(rows, predictions, title)
    return [curves, predictions]
