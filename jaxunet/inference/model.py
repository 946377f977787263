"""A trained model as one works with it: masks, probabilities and scores of a run."""

from collections.abc import Sequence
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
from jaxunet.devices.strategies import Strategy, make_strategy
from jaxunet.errors import DataError
from jaxunet.inference.prediction import checked, predict_image
from jaxunet.learning.clean_up import clean_up
from jaxunet.learning.views import Views
from jaxunet.runs.calibration import Auto, settle
from jaxunet.runs.checkpoint import Which
from jaxunet.runs.evaluation import describe_split, report
from jaxunet.runs.loading import Probabilities, TrainedModel, compile_probabilities
from jaxunet.runs.loading import load as load_trained
from jaxunet.runs.own_data import own_split
from jaxunet.runs.scoring import evaluate_split


@dataclass(frozen=True)
class Model:
    """The model of a run, or of several together; it predicts pictures of any size, one at a
    time, on one device."""

    trained: TrainedModel

    @property
    def config(self) -> Config:
        """What the run, or the first of several, was made with."""
        return self.trained.config

    def probabilities(self, image: np.ndarray) -> Float[np.ndarray, "height width"]:
        """The probability of lesion for each pixel, float32, at the picture's own size.

        Args:
            image: uint8 `[height, width, 3]`, RGB.

        Raises:
            DataError: `image` is not uint8 `[height, width, 3]`.
            RunError: a probability is not finite.
        """
        picture, side = _picture(image), self.config.data.image_size
        pixels = resize_image(picture, side, side)[np.newaxis]
        small = checked(self._compiled, pixels, ["the picture"])[0, :, :, 0]
        size = (picture.shape[1], picture.shape[0])
        return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BILINEAR))

    def predict(
        self, image: np.ndarray, *, clean: bool = False
    ) -> UInt8[np.ndarray, "height width"]:
        """The mask, 0 or 255, at the picture's own size; as `experiments/predict.py` writes it.

        >>> mask = jaxunet.load("runs/a").predict(np.asarray(PIL.Image.open("photo.jpg")))

        Args:
            image: uint8 `[height, width, 3]`, RGB.
            clean: fill holes and keep the largest region only.

        Raises:
            DataError: `image` is not uint8 `[height, width, 3]`.
            RunError: a probability is not finite.
        """
        mask = predict_image(
            self._compiled,
            _picture(image),
            image_size=self.config.data.image_size,
            threshold=self.trained.recipe.threshold,
        )
        return clean_up(mask) if clean else mask

    @cached_property
    def _compiled(self) -> Probabilities:
        return compile_probabilities(_one_device(), self.trained.recipe, self.trained.variables)


def _picture(image: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"The picture is {image.dtype}{list(image.shape)}, but must be "
            "uint8[height, width, 3]: PIL.Image.open(FILE).convert('RGB'), say."
        )
    return image


Runs = Path | str | Sequence[Path | str]
"""One run directory, or several: an ensemble, whose probabilities are averaged."""


def _one_device() -> Strategy:
    return make_strategy("jit", jax.local_devices()[:1])


def _paths(runs: Runs) -> list[Path]:
    return list(map(Path, [runs] if isinstance(runs, Path | str) else runs))


def load(
    runs: Runs,
    which: Which = "latest",
    views: Views = "none",
    *,
    threshold: float | Auto | None = None,
    temperature: float | Auto = 1.0,
) -> Model:
    """The model of a run directory, or of a list of them together: the latest checkpoints, or
    the best on validation.

    >>> model = jaxunet.load("runs/a", "best")

    Args:
        views: `flips` averages probabilities over a picture's four flips, `d4` over its eight
            turns.
        threshold: probability above which a pixel is lesion; None: the run's own; `auto`:
            the best on its validation split, kept in the run.
        temperature: what logits are divided by; `auto`: as above.

    Raises:
        ConfigError: there are no such `views`, or the runs have no common mean.
        RunError: one is no run directory, or has no checkpoint that fits it.
        DataError: what is `auto` was not fitted yet, and the run's data are gone.
    """
    trained = load_trained(_paths(runs), which, views)
    return Model(
        settle(
            trained,
            _one_device(),
            threshold=threshold,
            temperature=temperature,
            show_progress=False,
        )
    )


def evaluate(
    runs: Runs,
    split: str = "validation",
    which: Which = "latest",
    *,
    views: Views = "none",
    threshold: float | Auto | None = None,
    temperature: float | Auto = 1.0,
    clean: bool = False,
    data: DataConfig | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Score a run, or several together, on a split: the scores as in `evaluation-SPLIT.json`,
    and of which data. Nothing is written but what is `auto`.

    >>> jaxunet.evaluate("runs/a", "test")["scores"]["per_image"]["dice"]

    Args:
        views, threshold, temperature: see `load`.
        clean: fill the masks' holes and keep the largest region only.
        data: other data than the run's own (its `image_size` is taken from the run).

    Raises:
        ConfigError: the runs have no common mean.
        RunError: one has no checkpoint that fits it.
        DataError: there is no such split, or the run's own data have changed.
    """
    strategy = make_strategy("jit")
    trained = load_trained(_paths(runs), which, views)
    own = trained.config.data
    chosen = replace(data, image_size=own.image_size) if data else own
    model = settle(
        trained,
        strategy,
        threshold=threshold,
        temperature=temperature,
        data=chosen,
        show_progress=show_progress,
    )
    if data:
        prepared = prepare(chosen, progress=show_progress)
        dataset = describe_split(prepared, split, own.image_size)
    else:
        prepared, dataset = own_split(
            model, split, advice="Give `data` if they are meant.", show_progress=show_progress
        )
    evaluation = evaluate_split(
        model, strategy, prepared, split, chosen, clean=clean, show_progress=show_progress
    )
    return report(evaluation, dataset=dataset, step=model.step, epoch=model.epoch)
