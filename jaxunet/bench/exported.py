"""Exported files timed beside jaxunet's own predict step."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunet.bench.rounds import describe, ratio, time_rounds
from jaxunet.bench.setting import Setting, Timing
from jaxunet.bench.steps import initial_state, make_step, random_batch, step_flops
from jaxunet.config import Config, ModelConfig
from jaxunet.config_json import from_dict
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import DataError

Opened = tuple[dict[str, str], Callable[[np.ndarray], Any]]
"""What a file says of itself, and a function of images that waits for the result."""


def config_of(base: Config, path: Path) -> Config:
    """`base` with the model and the image size of an exported file.

    Raises:
        DataError: it is no file of `experiments/export.py`, or one with --native.
    """
    said = _opened(path)[0]
    alone = said.get("views") == "none" and said.get("members") == "1"
    if "model" not in said or said.get("native") == "true" or not alone:
        raise DataError(
            f"{path} can't be timed: it is no file that experiments/export.py wrote for "
            "batches of pictures (without --native), of one network and without --views."
        )
    model = from_dict(ModelConfig, json.loads(said["model"]))
    data = replace(base.data, image_size=int(said["image_size"]))
    return replace(base, model=model, data=data)


def measure_exported(path: Path, setting: Setting, timing: Timing) -> dict[str, Any]:
    """Times of the file and of our predict step for its model, in turn."""
    config, batch_size = setting.config, setting.config.train.batch_size
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    ours = make_step(strategy, config, "predict", initial_state(config), batch_size)
    run = _opened(path)[1]
    images = random_batch(config, batch_size)["image"]

    def theirs(steps: int) -> None:
        for _ in range(steps):
            run(images)

    times = time_rounds({"jaxunet": ours, "file": theirs}, timing.rounds, timing.seconds)
    flops = step_flops(config, "predict", batch_size)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "jaxunet": describe(times["jaxunet"], batch_size, flops),
        "exported": describe(times["file"], batch_size, flops),
        "exported_over_jaxunet": ratio(times["file"], times["jaxunet"]),
    }


def _opened(path: Path) -> Opened:
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return (_onnx if path.suffix == ".onnx" else _stablehlo)(contents)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path} needs onnxruntime: python -m pip install -e '.[onnx]'."
        ) from error
    except Exception as error:  # of flatbuffers, protobuf, JSON: whatever a strange file raises
        raise DataError(f"{path} is no file of experiments/export.py.") from error


def _onnx(contents: bytes) -> Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(contents)
    (given,) = session.get_inputs()
    said = dict(session.get_modelmeta().custom_metadata_map)
    return said, lambda images: session.run(None, {given.name: images})


def _stablehlo(contents: bytes) -> Opened:
    program = jax.export.deserialize(bytearray(contents))
    call = jax.jit(program.call)
    return dict(json.loads(program.fun_name)), lambda images: np.asarray(call(images))
