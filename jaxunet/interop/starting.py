"""Weights to fine-tune, from a run or from a PyTorch file."""

import hashlib
from pathlib import Path

from flax import traverse_util

from jaxunet.errors import DataError
from jaxunet.interop.pytorch import fitting_variables
from jaxunet.interop.weight_files import load_weights
from jaxunet.runs.loading import load
from jaxunet.runs.model_card import facts
from jaxunet.runs.starting import Given


def weights_to_start_from(source: Path) -> Given:
    """The weights of a run's latest checkpoint, averaged where it averages, or of a PyTorch
    file that `experiments/import_pytorch.py` would take; of that also a part.

    Raises:
        RunError: the run has no checkpoint that can be used.
        DataError: the file can't be read, or is of no U-Net that jaxunet knows.
    """
    if (source / "config.json").exists():
        model = load(source)
        variables = model.variables
        digest = hashlib.sha256()
        for name, leaf in sorted(traverse_util.flatten_dict(variables, sep="/").items()):
            digest.update(name.encode())
            digest.update(leaf.tobytes())
        licence = facts(source)["licence"]
        return Given(
            variables, str(source), digest.hexdigest(), model.config.model, licence=licence
        )
    found = load_weights(source)
    try:
        config, variables, unusable = fitting_variables(found.state)
    except DataError as error:
        raise DataError(f"--init-from {source} can't be used. {error}") from error
    left_over = (*unusable, *found.left_out)
    return Given(variables, source.name, found.sha256, config, unusable=left_over)
