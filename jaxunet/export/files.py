"""A run's model written as a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jaxunet.config_json import to_dict
from jaxunet.devices.environment import version_of
from jaxunet.errors import ConfigError
from jaxunet.export.stablehlo import make_stablehlo
from jaxunet.files import check_writable, write_atomically
from jaxunet.runs.loading import TrainedModel
from jaxunet.runs.model_card import facts

Format = Literal["onnx", "stablehlo"]


def export(
    model: Callable[[], TrainedModel], out: Path, kind: Format, *, native: bool = False
) -> dict[str, str]:
    """Write a model to `out`, and return what the file says of itself.

    Args:
        model: gives it, once it is known that it can be written.
        native: one picture of any size in and its probability at that size out; ONNX only.

    Raises:
        ConfigError: a package is missing, or the model has no such form.
        RunError: `out` can't be written.
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
    trained = model()
    said = {**metadata(trained), "native": json.dumps(native)}
    if kind == "onnx":
        from jaxunet.export.onnx_file import make_onnx, write_onnx  # the extra `[onnx]`

        write_onnx(make_onnx(trained, said, native=native), out)
    else:
        write_atomically(out, make_stablehlo(trained, said))
    return said


def metadata(model: TrainedModel) -> dict[str, str]:
    """What a file says of the model in it: names and texts, JSON where they have parts."""
    known, recipe = facts(model.members[0].run), model.recipe
    way = {"views": recipe.views, "temperature": recipe.temperature, "clean": False}
    way |= {"threshold": recipe.threshold, "runs": len(model.members)}
    known["results"] = [
        each
        for each in known["results"]
        if each["step"] == model.step and each["way"] == way and len(model.members) == 1
    ]
    known |= {"step": model.step, "epoch": model.epoch, "members": len(model.members), **way}
    known["model"] = to_dict(model.config.model)
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
