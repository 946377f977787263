"""Score a trained model on a split, with all that its maps say."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Bool

from jaxunet.config import DataConfig
from jaxunet.data.prepared import Prepared
from jaxunet.devices import tuning
from jaxunet.devices.compiling import Compilation
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import Strategy, check_divisible
from jaxunet.learning.calibration import reliability
from jaxunet.learning.clean_up import cleaned
from jaxunet.learning.metrics import Counts, count
from jaxunet.learning.steps import maps_step
from jaxunet.runs.evaluation import Evaluation, mean_loss, results
from jaxunet.runs.loading import TrainedModel

Maps = Mapping[str, np.ndarray]
"""What `jaxunet.learning.steps.maps_step` gives for the images of a batch."""


def evaluate_split(
    model: TrainedModel,
    strategy: Strategy,
    data: Prepared,
    split: str,
    config: DataConfig,
    *,
    clean: bool = False,
    look: Callable[[Maps], None] = lambda maps: None,
    show_progress: bool = True,
) -> Evaluation:
    """Score a model on a split, or a slice of one, of a prepared dataset.

    Args:
        config: how the data are read; pixels are left out where it has an `ignore_value`,
            whatever the model was trained with.
        clean: score masks as `jaxunet.learning.clean_up` leaves them.
        look: called with the maps of each batch, in the dataset's order, where they are
            finite.
    """
    feed = Feed(strategy, data.source(split), config, progress=show_progress, fill=False)
    recipe = replace(model.recipe, ignores=config.ignore_value is not None)
    step = feed.compile(partial(maps_step, recipe), outputs="replicated")
    variables = strategy.replicate(model.variables)
    batch_size = tuning.eval_batch_size(model.config.train)
    check_divisible("train.eval_batch_size", batch_size, len(strategy.devices))
    compilation = Compilation(
        "the eval step", lambda: feed.lower(step, variables, batch_size), show=show_progress
    )
    feed.fill()  # meanwhile
    compilation.finish()
    start, threshold = time.perf_counter(), recipe.threshold
    losses, counts, bins = [], [], []
    for maps in results(feed, step, variables, model.config, progress=show_progress):
        losses.append({"loss": maps["loss"]})
        if not np.isfinite(maps["probabilities"]).all():
            # The loss is not finite either, and whoever reads the scores is told so.
            maps = {**maps, "probabilities": np.nan_to_num(maps["probabilities"])}
        else:
            look(maps)
        counts.append(pixel_counts(maps, threshold) if clean else maps["counts"])
        bins.append(reliability(maps["probabilities"], maps["truth"], maps.get("counted", ...)))
    return Evaluation(
        np.concatenate(counts).astype(np.int64),
        mean_loss(losses),
        time.perf_counter() - start,
        bins=np.concatenate(bins),
    )


def pixel_counts(maps: Maps, threshold: float) -> Counts:
    """The counts of each image's mask, cleaned up."""
    return mask_counts(cleaned(maps["probabilities"] > threshold), maps)


def mask_counts(masks: Bool[np.ndarray, "images height width"], maps: Maps) -> Counts:
    """The counts of each mask against the truth of `maps`, of the pixels that count."""
    rows = zip(masks, maps["truth"], maps.get("counted", [...] * len(masks)), strict=True)
    return np.stack([count(*row) for row in rows])
