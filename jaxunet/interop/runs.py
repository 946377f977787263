"""Run directories from PyTorch weights, and PyTorch weights from run directories."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxunet.checkpoint import Checkpoints, Which
from jaxunet.config import Config, to_dict
from jaxunet.errors import DataError
from jaxunet.files import write_json
from jaxunet.interop.layouts import LayoutName, layout_of
from jaxunet.interop.pytorch import (
    counters,
    state_dict_from_variables,
    variables_from_state_dict,
)
from jaxunet.interop.weight_files import load_weights, save_weights
from jaxunet.run import RunDirectory
from jaxunet.steps import make_recipe, state_from_variables
from jaxunet.trained import load
from jaxunet.training import Progress
from jaxunet.unet import count_parameters

IMPORT_FILE = "pytorch.json"
"""In an imported run: the weight file's name, SHA-256, layout and batch counters."""


def import_weights(weights: Path, out: Path, config: Config) -> tuple[Config, LayoutName]:
    """Make the run directory `out` around the weights of a PyTorch file.

    It stands at step 0: `evaluate.py` and `predict.py` use it as it is, and
    `train.py --resume` fine-tunes it.

    Args:
        config: data, optimizer and training; its model is replaced by the weights' own.

    Returns:
        The run's configuration, and the layout that was recognised.

    Raises:
        DataError: the weights can't be loaded or fit no model; nothing is written then.
        RunError: `out` is not empty or can't be written to.
    """
    state = load_weights(weights)
    try:
        model, layout, variables = variables_from_state_dict(state)
    except DataError as error:
        raise DataError(f"{weights} cannot be imported. {error}") from error
    config = replace(config, model=model)
    recipe = make_recipe(config)
    train_state = jax.tree.map(np.asarray, state_from_variables(recipe, variables))
    with RunDirectory(out, config, resume=False) as run:
        checkpoints = Checkpoints(out / "checkpoints", config.train.best_metric)
        try:
            checkpoints.save(train_state, {**vars(Progress()), "config": to_dict(config)})
            checkpoints.wait()
        finally:
            checkpoints.close()
        record = {
            "weights": weights.name,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "layout": layout,
            "parameters": count_parameters(variables["params"]),
            "num_batches_tracked": counters(state),
        }
        write_json(out / IMPORT_FILE, record)
        run.write_config({"name": config.data.name, "imported_from": weights.name})
    return config, layout


def export_weights(run: Path, path: Path, which: Which = "latest") -> LayoutName:
    """Write the weights of a run's checkpoint as PyTorch's `load_state_dict` takes them.

    Averaged weights (`optimizer.ema_decay`) where there are any. `num_batches_tracked`
    counts the run's batches on top of what an import brought.

    Raises:
        RunError: `run` is no run directory or has no checkpoint.
        ConfigError: the model has no PyTorch layout, or `path` names no known format.
    """
    model = load(run, which)
    layout = layout_of(model.config.model)
    imported = run / IMPORT_FILE
    counted = {}
    if imported.exists():
        counted = json.loads(imported.read_text(encoding="utf-8"))["num_batches_tracked"]
    state = state_dict_from_variables(
        model.config.model,
        model.variables,
        layout,
        counted=counted,
        steps=model.step * model.config.optimizer.accumulate_steps,
    )
    save_weights(path, state)
    return layout
