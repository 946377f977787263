"""Run directories from PyTorch weights, and PyTorch weights from run directories."""

import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.errors import DataError, RunError
from jaxunet.files import write_json
from jaxunet.interop.layouts import LayoutName, layout_of
from jaxunet.interop.pytorch import (
    counters,
    state_dict_from_variables,
    variables_from_state_dict,
)
from jaxunet.interop.weight_files import check_target, load_weights, save_weights, unwritable
from jaxunet.learning.steps import Recipe, make_recipe, state_from_variables
from jaxunet.model.unet import count_parameters
from jaxunet.runs.checkpoint import Checkpoints, Which
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.journal import Position
from jaxunet.runs.loading import load

IMPORT_FILE = "pytorch.json"
"""In an imported run: the weight file's name and SHA-256, what of it was taken and as what,
and its batch counters."""


def import_weights(weights: Path, out: Path, config: Config) -> tuple[Config, LayoutName]:
    """Make the run directory `out` around the weights of a PyTorch file.

    It stands at step 0: `evaluate.py` and `predict.py` use it as it is, and
    `train.py --resume` fine-tunes it.

    Args:
        config: data, optimizer and training, as the run is to be evaluated and fine-tuned; its
            model is replaced by the weights' own.

    Returns:
        The run's configuration, and the layout that was recognised.

    Raises:
        DataError: the weights can't be loaded, fit no model or are not finite; nothing is
            written then.
        RunError: `out` is not empty or can't be written to.
    """
    if reason := unwritable(out):
        raise RunError(f"--out {out} cannot be written to: {reason}.")
    if out.exists():  # a run that stands there is named before the weights are read
        RunDirectory(out, config, resume=False).close()
    found = load_weights(weights)
    try:
        model, layout, variables = variables_from_state_dict(found.state)
    except DataError as error:
        raise DataError(f"{weights} cannot be imported. {error}") from error
    config = replace(config, model=model)
    recipe = make_recipe(config)
    _check_memory(weights, recipe, variables)
    train_state = jax.tree.map(np.asarray, state_from_variables(recipe, variables))
    with RunDirectory(out, config, resume=False) as run:
        checkpoints = Checkpoints(out / "checkpoints", config.train.best_metric)
        try:
            checkpoints.save(train_state, {**vars(Position()), "config": to_dict(config)})
            checkpoints.wait()
        finally:
            checkpoints.close()
        record = {
            "weights": weights.name,
            "sha256": found.sha256,
            "dictionary": found.dictionary,
            "prefix": found.prefix,
            "left_out": found.left_out,
            "layout": layout,
            "parameters": count_parameters(variables["params"]),
            "num_batches_tracked": counters(found.state),
        }
        write_json(out / IMPORT_FILE, record)
        run.write_config({"name": config.data.name, "imported_from": weights.name})
    return config, layout


def export_weights(run: Path, path: Path, which: Which = "latest") -> LayoutName:
    """Write the weights of a run's checkpoint as PyTorch's `load_state_dict` takes them.

    Averaged weights (`optimizer.ema_decay`) where there are any. `num_batches_tracked`
    counts the run's batches on top of what an import brought.

    Raises:
        RunError: `run` is no run directory, has no checkpoint, or its weights are not finite.
        ConfigError: the model has no PyTorch layout, or `path` names no known format.
        DataError: `path` cannot be written.
    """
    check_target(path)
    model = load(run, which)
    layout = layout_of(model.config.model)
    state = state_dict_from_variables(
        model.config.model,
        model.variables,
        layout,
        counted=_counted(run),
        steps=model.step * model.config.parts_per_step,
    )
    save_weights(path, state)
    return layout


def _counted(run: Path) -> dict[str, int]:
    """The batch counters that an import brought; of another run there are none."""
    path = run / IMPORT_FILE
    if not path.exists():
        return {}
    try:
        counted = json.loads(path.read_bytes())["num_batches_tracked"]
        return {str(name): int(count) for name, count in counted.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} is not the record of an import: {error!r}. Import the weights again, or "
            "move it away, and num_batches_tracked counts from 0."
        ) from error


def _check_memory(weights: Path, recipe: Recipe, variables: dict[str, Any]) -> None:
    """The optimizer's state is up to twice as large as the weights; tell before it is made."""
    state = jax.eval_shape(partial(state_from_variables, recipe), variables)
    leaves = jax.tree.leaves(state)
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if needed > (there := _memory()):
        raise DataError(
            f"{weights} makes a run whose training state takes {needed / 1e9:.1f} GB, with the "
            f"optimizer's, but this machine has {there / 1e9:.1f} GB. Import it on a larger "
            "one, or choose optimizer.name 'sgd' and no optimizer.ema_decay."
        )


def _memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
