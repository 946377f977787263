"""A trained model as one works with it: masks, probabilities and scores of a run."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxunet.config import Config, DataConfig
from jaxunet.data.images import resize_image
from jaxunet.data.prepare import prepare
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import DataError
from jaxunet.learning.views import Views
from jaxunet.runs.checkpoint import Which
from jaxunet.runs.evaluation import describe_split, report
from jaxunet.runs.loading import (
    Probabilities,
    TrainedModel,
    compile_probabilities,
    evaluate_split,
)
from jaxunet.runs.loading import load as load_trained
from jaxunet.runs.record import other_data, recorded_fingerprint


@dataclass(frozen=True)
class Model:
    """The model of a run; it predicts pictures of any size, one at a time, on one device."""

    trained: TrainedModel

    @property
    def config(self) -> Config:
        """What the run was made with."""
        return self.trained.config

    def probabilities(self, image: np.ndarray) -> Float[np.ndarray, "height width"]:
        """The probability of lesion for each pixel, float32, at the picture's own size.

        Args:
            image: uint8 `[height, width, 3]`, RGB.

        Raises:
            DataError: `image` is not uint8 `[height, width, 3]`.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                f"The picture is {image.dtype}{list(image.shape)}, but must be "
                "uint8[height, width, 3]: PIL.Image.open(FILE).convert('RGB'), say."
            )
        side = self.config.data.image_size
        small = self._compiled(resize_image(image, side, side)[np.newaxis])[0, :, :, 0]
        size = (image.shape[1], image.shape[0])
        return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BILINEAR))

    def predict(self, image: np.ndarray) -> UInt8[np.ndarray, "height width"]:
        """The mask, 0 or 255, at the picture's own size; as `experiments/predict.py` writes it.

        >>> mask = jaxunet.load("runs/a").predict(np.asarray(PIL.Image.open("photo.jpg")))

        Args:
            image: uint8 `[height, width, 3]`, RGB.

        Raises:
            DataError: `image` is not uint8 `[height, width, 3]`.
        """
        lesion = self.probabilities(image) > self.config.train.threshold
        return np.where(lesion, 255, 0).astype(np.uint8)

    @cached_property
    def _compiled(self) -> Probabilities:
        strategy = make_strategy("jit", jax.local_devices()[:1])
        return compile_probabilities(strategy, self.trained.recipe, self.trained.variables)


def load(run: Path | str, which: Which = "latest", views: Views = "none") -> Model:
    """The model of a run directory: its latest checkpoint, or the best on validation.

    `views` flips averages probabilities over a picture's four flips, d4 over its eight turns.

    >>> model = jaxunet.load("runs/a", "best")

    Raises:
        RunError: `run` is no run directory, or has no checkpoint that fits it.
    """
    return Model(load_trained(Path(run), which, views))


def evaluate(
    run: Path | str,
    split: str = "validation",
    which: Which = "latest",
    *,
    views: Views = "none",
    data: DataConfig | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Score a run on a split; what `evaluation-SPLIT.json` holds, but nothing is written.

    >>> jaxunet.evaluate("runs/a", "test")["scores"]["per_image"]["dice"]

    Args:
        views: see `load`.
        data: other data than the run's own (its `image_size` is taken from the run).

    Raises:
        RunError: `run` has no checkpoint that fits it.
        DataError: there is no such split, or the run's own data have changed.
    """
    model = load_trained(Path(run), which, views)
    own = model.config.data
    chosen = replace(data, image_size=own.image_size) if data else own
    recorded = None if data else recorded_fingerprint(Path(run))
    prepared = prepare(chosen, progress=show_progress, recorded=recorded)
    dataset = describe_split(prepared, split, own.image_size)
    if data is None and (said := other_data(Path(run), dataset, chosen)):
        raise DataError(f"{said} Give `data` if they are meant.")
    evaluation = evaluate_split(
        model, make_strategy("jit"), prepared, split, chosen, show_progress=show_progress
    )
    return report(evaluation, dataset=dataset, step=model.step, epoch=model.epoch)
