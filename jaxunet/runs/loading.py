"""A trained model, taken from a run directory, ready to be evaluated or to predict."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxunet.config import Config, DataConfig
from jaxunet.data.prepared import Prepared
from jaxunet.devices import tuning
from jaxunet.devices.compiling import Compilation
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import Strategy
from jaxunet.errors import RunError
from jaxunet.learning.steps import Recipe, eval_step, init_state, make_recipe, predict_step
from jaxunet.learning.views import Views
from jaxunet.runs.checkpoint import Checkpoints, Which
from jaxunet.runs.evaluation import Evaluation, evaluate
from jaxunet.runs.finite import not_finite
from jaxunet.runs.record import config_of_main, load_config

Probabilities = Callable[
    [UInt8[np.ndarray, "batch height width 3"]], Float[np.ndarray, "batch height width 1"]
]


@dataclass(frozen=True)
class TrainedModel:
    """Weights of one checkpoint with the configuration that they belong to.

    Attributes:
        variables: host arrays to apply the model with (averaged weights where there are any).
        step, epoch: how long it was trained.
    """

    config: Config
    recipe: Recipe
    variables: Any
    step: int
    epoch: int


def load(run: Path, which: Which = "latest", views: Views = "none") -> TrainedModel:
    """The latest or the best checkpoint of `run`, and how it is to see pictures.

    Raises:
        RunError: `run` is no run directory, has no checkpoint that fits its configuration,
            or its weights are not finite.
    """
    config = config_of_main(lambda: load_config(run))
    recipe = replace(make_recipe(config), views=views)
    checkpoints = Checkpoints(run / "checkpoints", config.train.best_metric, read_only=True)
    try:
        like = jax.eval_shape(partial(init_state, recipe))
        step, state, progress = checkpoints.restore(which, like)
    finally:
        checkpoints.close()
    if reason := not_finite(state.variables):
        raise RunError(
            f"The {which} checkpoint of {run}, of step {step}, is of no use: {reason}. Take "
            "another checkpoint, or train anew with a smaller optimizer.learning_rate."
        )
    return TrainedModel(config, recipe, state.variables, step, progress["evaluated_epochs"])


def evaluate_split(
    model: TrainedModel,
    strategy: Strategy,
    data: Prepared,
    split: str,
    config: DataConfig,
    *,
    show_progress: bool = True,
) -> Evaluation:
    """Score a model on a split, or a slice of one, of a prepared dataset.

    Args:
        config: how the data are read.
    """
    feed = Feed(strategy, data.source(split), config, progress=show_progress, fill=False)
    step = feed.compile(partial(eval_step, model.recipe), outputs="replicated")
    variables = strategy.replicate(model.variables)
    batch_size = tuning.eval_batch_size(model.config.train)
    compilation = Compilation(
        "the eval step", lambda: feed.lower(step, variables, batch_size), show=show_progress
    )
    feed.fill()  # meanwhile
    compilation.finish()
    return evaluate(feed, step, variables, model.config, progress=show_progress)


def compile_probabilities(
    strategy: Strategy, recipe: Recipe, host_variables: Any
) -> Probabilities:
    """A function from uint8 images to probabilities, over the devices of `strategy`.

    Images must come in batches that the devices divide; each new shape is compiled once.
    """
    step = strategy.compile(partial(predict_step, recipe), outputs="split")
    variables = strategy.replicate(host_variables)

    def probabilities(
        images: UInt8[np.ndarray, "batch height width 3"],
    ) -> Float[np.ndarray, "batch height width 1"]:
        return strategy.gather(step(variables, strategy.split(images)))

    return probabilities
