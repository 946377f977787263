"""What a run starts from: drawn weights, a pretrained encoder's, another network's, or its own
latest checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jaxunet.bars import note, say
from jaxunet.config import Config, DataConfig, ModelConfig
from jaxunet.data.prepared import Prepared
from jaxunet.devices.distributed import same_everywhere
from jaxunet.errors import ConfigError, DataError, RunError
from jaxunet.learning.steps import (
    Recipe,
    TrainState,
    init_state,
    make_recipe,
    state_from_variables,
)
from jaxunet.pretrained.starting import StartingWeights, starting_weights, with_encoder
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.journal import Position

LISTED = 8
"""Names of tensors that were not taken which a record and a message hold of each kind."""


@dataclass(frozen=True)
class Given:
    """Weights to fine-tune.

    Attributes:
        variables: `params` and `batch_stats` of a U-Net, on the host.
        source: the file or run directory they are of.
        sha256: of the file, or of the checkpoint's arrays.
        config: the shape of the network that they are of.
        licence: of the source, as far as it is known.
        unusable: what of the source is none of `variables`, by the source's own names.
    """

    variables: Mapping[str, Any]
    source: str
    sha256: str
    config: ModelConfig
    licence: str = "not recorded"
    unusable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """The state before the first step, and for the run's record what it was made from."""

    state: TrainState
    weights: dict[str, str] | None
    init_from: dict[str, Any] | None


def say_what_both_splits_hold(data: Prepared, config: DataConfig, *, show: bool = True) -> None:
    """A warning if pictures to validate on are trained on."""
    if show and (both := data.shared(config.train_split, config.validation_split)):
        note(
            f"warning: {both:,} pictures of data.validation_split {config.validation_split!r} "
            f"are in data.train_split {config.train_split!r}, too: what is trained on scores "
            "better than what is not."
        )


def same_start(pretrained: StartingWeights | None, given: Given | None) -> None:
    """Make sure that every process has the same weights to start from.

    Raises:
        RunError: one differs from process 0; on every process, with the same message.
    """
    sha256 = {
        "model.weights": pretrained.record["sha256"] if pretrained else "none",
        "--init-from": given.sha256 if given else "none",
    }
    same_everywhere({"sha256": sha256})


def start(
    recipe: Recipe, config: ModelConfig, given: Given | None = None, *, show: bool = False
) -> Start:
    """The state before the first step, on the host.

    Args:
        show: say what was taken of `given`.

    Raises:
        ConfigError, DataError: `config.weights` can't be had; see `starting_weights`.
        DataError: nothing of `given` fits.
        RunError: processes have other weights; see `same_start`.
    """
    state = jax.tree.map(np.asarray, init_state(recipe))
    variables, weights, record = state.variables, None, None
    pretrained = starting_weights(config)
    same_start(pretrained, given)
    if pretrained:
        variables, weights = with_encoder(variables, pretrained.variables), pretrained.record
    if given is not None:
        variables, record = with_fitting(variables, given, config)
        if show:
            say(in_words(record))
    if weights or record:
        state = jax.tree.map(np.asarray, state_from_variables(recipe, variables))
    return Start(state, weights, record)


def latest(
    checkpoints: Checkpoints, config: Config, batches_per_epoch: int, *, other_data: bool
) -> tuple[int, TrainState, Position]:
    """Steps done, the state on the host, and where the run stands at its latest checkpoint.

    Args:
        other_data: the run goes on with other data than before.

    Raises:
        RunError: none can be read, or more steps are done than `config` asks for.
    """
    like = jax.tree.map(np.asarray, init_state(make_recipe(config)))
    step, state, record = checkpoints.restore("latest", like)
    del record["config"]
    position = Position(**record)
    if position.batches_per_epoch not in (None, batches_per_epoch):
        # Other data, whose epochs have another length, begin with an epoch.
        next_batch = position.evaluated_epochs * batches_per_epoch
        position.loader = {"next_batch": next_batch}
        position.epoch_loss = position.epoch_examples = 0.0
        position.shift = next_batch - step
    position.batches_per_epoch = batches_per_epoch
    if step > (total := position.steps_until(config.train.epochs)):
        raise RunError(
            f"The run has done {step} steps, but train.epochs {config.train.epochs} is only "
            f"{total}; ask for more."
        )
    if other_data or position.best_score is None:  # not comparable, or not noted by a version
        position.best_score, position.best_epoch = None, position.evaluated_epochs
    return step, state, position


def with_fitting(
    variables: Mapping[str, Any], given: Given, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`variables` with every tensor of `given` whose name and shape fit, and the record of it.

    Normalisations of another kind have the same names and shapes, and are left.

    Raises:
        ConfigError: `given` joins the decoder's halves in the other order: its kernels fit,
            and would be wrong.
        DataError: none fits.
    """
    if given.config.concat != config.concat:
        raise ConfigError(
            f"{given.source} joins the decoder's maps in the order {given.config.concat!r}, "
            f"this model in {config.concat!r}: its kernels would fit, and be wrong. Give "
            f"--model.concat {given.config.concat}."
        )
    own, theirs = (
        traverse_util.flatten_dict(dict(tree), sep="/") for tree in (variables, given.variables)
    )
    if given.config.norm != config.norm:
        theirs = {name: value for name, value in theirs.items() if "/norm_" not in name}
    taken = {name for name in own if np.shape(own[name]) == np.shape(theirs.get(name))}
    other_shape = sorted(name for name in own if name in theirs and name not in taken)
    missing = sorted(name for name in own if name not in theirs)
    unused = sorted(name for name in theirs if name not in own)
    if not taken:
        raise DataError(
            f"Nothing of {given.source} fits this model: of its {len(theirs)} tensors none has "
            f"the name and the shape of one here (there {_some(sorted(theirs))}; here "
            f"{_some(sorted(own))}). Choose the model that it is of, by --model options."
        )
    merged = {name: theirs[name] if name in taken else own[name] for name in own}
    record = {
        "source": given.source,
        "sha256": given.sha256,
        "licence": given.licence,
        "taken": len(taken),
        "as_drawn": [f"{name} (other shape)" for name in other_shape] + missing,
        "left_over": [*unused, *given.unusable],
    }
    return traverse_util.unflatten_dict(merged, sep="/"), record


def in_words(record: Mapping[str, Any]) -> str:
    """A few lines on what `with_fitting` took, for the user."""
    lines = [f"From {record['source']}: {record['taken']} tensors taken"]
    if record["as_drawn"]:
        lines.append(f"  stay as drawn: {_some(record['as_drawn'])}")
    if record["left_over"]:
        lines.append(f"  of it left over: {_some(record['left_over'])}")
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
