"""Weight files of encoders, `.pth` and `.safetensors`, as NumPy arrays by their names.

What kind of file it is shows in its content. No code of it runs: see `pickles`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxunet.errors import ConfigError, DataError
from jaxunet.pretrained.pickles import NotPlain, Tensor, read_pickle

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIX = "module."


def read_bytes(path: Path) -> bytes:
    """The contents of a weight file.

    Raises:
        DataError: it is not there, no file, or may not be read.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file; model.weights must name a .pth or .safetensors.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}, which model.weights names, cannot be read: {error.strerror}."
        ) from error


def read_tensors(path: Path, contents: bytes) -> dict[str, np.ndarray]:
    """The tensors of a weight file.

    Floating-point ones become float32. A dictionary under `state_dict` and a prefix `module.`
    are taken off.

    Raises:
        DataError: it is neither kind, damaged, or holds more than tensors.
        ConfigError: it is a .safetensors, and the extra `[pretrained]` is not installed.
    """
    # safetensors: the length of a JSON header in eight bytes, then the header.
    if contents[8:9] == b"{" and int.from_bytes(contents[:8], "little") <= len(contents):
        return _read_safetensors(path, contents)
    try:
        found = read_pickle(contents)
    except NotPlain as error:
        raise DataError(
            f"{path} was not loaded, since it holds more than plain tensors: {error}. Ask for "
            "a .safetensors, or, if you trust it, save its weights alone with "
            "torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # a broken pickle can make the reader raise anything
        raise DataError(f"{path} is no weight file of PyTorch, or a damaged one.") from error
    for wrapper in WRAPPERS:
        inner = found.get(wrapper)
        found = inner if isinstance(inner, Mapping) else found
    try:
        return {
            str(name).removeprefix(PREFIX): _in_float32(value.array())
            for name, value in found.items()
            if isinstance(value, Tensor)
        }
    except ValueError as error:
        raise DataError(f"{path} is a damaged weight file: {error}.") from error


def _read_safetensors(path: Path, contents: bytes) -> dict[str, np.ndarray]:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError(
            f"safetensors is not installed, and {path} needs it. Install the extra "
            "[pretrained]: python -m pip install -e '.[pretrained]'."
        ) from error
    try:
        found: dict[str, Any] = safetensors.numpy.load(contents)
    except Exception as error:  # whatever a broken file makes the reader raise
        raise DataError(f"{path} is not a readable .safetensors file: {error}") from error
    return {name.removeprefix(PREFIX): _in_float32(value) for name, value in found.items()}


def _in_float32(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype.kind == "f" else value
