"""A trained model, of one run or of several together, ready to be evaluated or to predict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from jaxunet.config import Config, require
from jaxunet.devices.strategies import Strategy
from jaxunet.errors import ConfigError, RunError
from jaxunet.learning.clean_up import cleaned
from jaxunet.learning.steps import Recipe, init_state, make_recipe, predict_step
from jaxunet.learning.views import QUARTERS, Views
from jaxunet.runs.checkpoint import Checkpoints, Which
from jaxunet.runs.finite import not_finite
from jaxunet.runs.integrity import checksum_of
from jaxunet.runs.record import config_of_main, load_config

Images = UInt8[np.ndarray, "batch height width 3"]
Probabilities = Callable[[Images], Float[np.ndarray, "batch height width 1"]]
Masks = Callable[[Images], Bool[np.ndarray, "batch height width"]]


@dataclass(frozen=True)
class Member:
    """One run of a model.

    Attributes:
        step, epoch: how long it was trained.
        weights: a checksum of them, by which they are known again.
    """

    run: Path
    which: Which
    config: Config
    step: int
    epoch: int
    weights: str

    def described(self) -> dict[str, Any]:
        """For the record."""
        return {
            "run": str(self.run.resolve()),
            "checkpoint": self.which,
            "step": self.step,
            "epoch": self.epoch,
            "weights": self.weights,
        }


@dataclass(frozen=True)
class TrainedModel:
    """Weights of one checkpoint, or of one of each of several runs: an ensemble, whose
    probabilities are the mean of theirs.

    Attributes:
        recipe: with all that says how its probabilities and masks come about.
        variables: host arrays to apply the model with (averaged weights where there are any);
            of an ensemble a tuple.
    """

    recipe: Recipe
    variables: Any
    members: tuple[Member, ...]

    @property
    def config(self) -> Config:
        """The configuration of the first run."""
        return self.members[0].config

    @property
    def step(self) -> int:
        """How long the first run was trained."""
        return self.members[0].step

    @property
    def epoch(self) -> int:
        """How long the first run was trained."""
        return self.members[0].epoch


def load(
    runs: Path | Sequence[Path], which: Which = "latest", views: Views = "none"
) -> TrainedModel:
    """The latest or the best checkpoint of `runs`, and how it is to see pictures.

    Raises:
        ConfigError: there are no such `views`, no runs, one is named twice, or they see
            pictures of different sizes.
        RunError: one is no run directory, has no checkpoint that fits its configuration,
            or its weights are not finite.
    """
    require(views in QUARTERS, "views", views, "'none', 'flips' or 'd4'")
    runs = [runs] if isinstance(runs, Path) else list(runs)
    configs = [config_of_main(partial(load_config, run)) for run in runs]
    check_together(runs, configs)
    members, recipes, variables = zip(
        *(_load(run, config, which) for run, config in zip(runs, configs, strict=True)),
        strict=True,
    )
    others = tuple(recipe.model for recipe in recipes[1:])
    recipe = replace(recipes[0], views=views, others=others)
    return TrainedModel(recipe, variables if others else variables[0], members)


def check_together(runs: Sequence[Path], configs: Sequence[Config]) -> None:
    """Raise `ConfigError` unless the probabilities of `runs` can be averaged."""
    if not runs:
        raise ConfigError("No run is given: name at least one run directory.")
    for place, run in enumerate(runs):
        if run.resolve() in [each.resolve() for each in runs[:place]]:
            raise ConfigError(f"{run} is given twice: an ensemble is of different runs.")
    first = configs[0].data.image_size
    for run, config in zip(runs, configs, strict=True):
        if config.data.image_size != first:
            raise ConfigError(
                f"{runs[0]} sees pictures at {first} px and {run} at "
                f"{config.data.image_size} px: their probabilities are of other pixels and "
                "have no mean. Give runs of one data.image_size."
            )


def _load(run: Path, config: Config, which: Which) -> tuple[Member, Recipe, Any]:
    recipe = make_recipe(config)
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
    weights = f"{checksum_of(state.variables):08x}"
    member = Member(run, which, config, step, progress["evaluated_epochs"], weights)
    return member, recipe, state.variables


def compile_probabilities(
    strategy: Strategy, recipe: Recipe, host_variables: Any
) -> Probabilities:
    """A function from uint8 images to probabilities, over the devices of `strategy`.

    Images must come in batches that the devices divide; each new shape is compiled once.
    """
    step = strategy.compile(partial(predict_step, recipe), outputs="split")
    variables = strategy.replicate(host_variables)

    def probabilities(images: Images) -> Float[np.ndarray, "batch height width 1"]:
        return strategy.gather(step(variables, strategy.split(images)))

    return probabilities


def compile_masks(
    strategy: Strategy, recipe: Recipe, host_variables: Any, *, clean: bool = False
) -> Masks:
    """As `compile_probabilities`, to masks: above the recipe's threshold, and cleaned up."""
    probabilities = compile_probabilities(strategy, recipe, host_variables)

    def masks(images: Images) -> Bool[np.ndarray, "batch height width"]:
        above = probabilities(images)[..., 0] > recipe.threshold
        return cleaned(above) if clean else above

    return masks
