"""A run's model written as a file."""

import json
from pathlib import Path
from typing import Literal

from jaxunet.devices.environment import version_of
from jaxunet.errors import ConfigError
from jaxunet.export.stablehlo import make_stablehlo
from jaxunet.files import check_writable, write_atomically
from jaxunet.learning.views import Views
from jaxunet.runs.checkpoint import Which
from jaxunet.runs.loading import TrainedModel, load
from jaxunet.runs.model_card import facts

Format = Literal["onnx", "stablehlo"]


def export(
    run: Path,
    out: Path,
    kind: Format,
    *,
    which: Which = "latest",
    views: Views = "none",
    native: bool = False,
) -> dict[str, str]:
    """Write a checkpoint's model to `out`, and return what the file says of itself.

    Args:
        native: one picture of any size in and its probability at that size out; ONNX only.

    Raises:
        ConfigError: a package is missing, or the model has no such form.
        RunError: `run` has no checkpoint that can be used, or `out` can't be written.
    """
    if native and kind == "stablehlo":
        raise ConfigError(
            "--native is --format onnx's: XLA compiles for fixed sizes, and a program that "
            "resizes pictures of any size can't be one. Resize before and after it, as "
            "jaxunet.load(RUN).probabilities does."
        )
    check_writable(out.resolve().parent, "--out")
    if kind == "onnx":
        check_onnx()
    model = load(run, which, views)
    said = metadata(run, model)
    if kind == "onnx":
        from jaxunet.export.onnx_file import make_onnx, write_onnx  # the extra `[onnx]`

        write_onnx(make_onnx(model, said, native=native), out)
    else:
        write_atomically(out, make_stablehlo(model, said))
    return said


def metadata(run: Path, model: TrainedModel) -> dict[str, str]:
    """What a file says of the model in it: names and texts, JSON where they have parts."""
    known = facts(run)
    known["results"] = [each for each in known["results"] if each["step"] == model.step]
    known |= {"step": model.step, "epoch": model.epoch, "views": model.recipe.views}
    known["exported_by"] = " ".join(f"{name} {version_of(name)}" for name in ("jaxunet", "jax"))
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in known.items()
    }


def check_onnx() -> None:
    """Raise `ConfigError` where the package onnx is missing."""
    try:
        import onnx  # noqa: F401 -- only whether it is there
    except ModuleNotFoundError as error:
        raise ConfigError(
            "An ONNX file is written by the package onnx: python -m pip install -e '.[onnx]'."
        ) from error
