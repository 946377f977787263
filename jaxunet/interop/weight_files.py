"""PyTorch weight files (`.pth`, `.pt`, `.safetensors`) to and from NumPy arrays.

A file from a stranger runs no code: pickles are read with `torch.load(weights_only=True)`,
which makes tensors and plain containers and refuses everything else.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxunet.errors import ConfigError, DataError
from jaxunet.files import write_atomically

State = dict[str, np.ndarray]

IGNORED = ("mask_values",)
"""Entries that are no weights and are left out: milesial/Pytorch-UNet notes the values that
its masks had."""
WRAPPERS = ("state_dict", "model_state_dict")
"""Keys under which training scripts keep the weights, beside optimizer state and the like."""
PARALLEL_PREFIX = "module."  # torch.nn.DataParallel's


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise _extra_is_missing("PyTorch") from error
    return torch


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise _extra_is_missing("safetensors") from error
    return safetensors.numpy


def _extra_is_missing(package: str) -> ConfigError:
    return ConfigError(
        f"{package} is not installed, and these weights need it. Install the extra [torch]: "
        "pip install 'jaxunet[torch]'."
    )


def load_weights(path: Path) -> State:
    """The tensors of a weight file, by name; which kind of file it is shows in its content.

    Half-precision tensors become float32, which loses nothing; float64 ones too, and are
    rounded.

    Raises:
        DataError: the file is not there, is neither kind, would run code, or holds
            something that is no tensor.
        ConfigError: the extra `[torch]` is not installed.
    """
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    # safetensors: the length of a JSON header in eight bytes, then the header.
    if contents[8:9] == b"{" and int.from_bytes(contents[:8], "little") <= len(contents):
        found: Mapping[str, Any] = _read_safetensors(path, contents)
    else:
        found = _read_pickle(path, contents)
    for wrapper in WRAPPERS:
        if isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    found = {name: value for name, value in found.items() if name not in IGNORED}
    wrong = [str(name) for name, value in found.items() if not isinstance(value, np.ndarray)]
    if wrong:
        raise DataError(
            f"{path} holds entries that are no tensors: {', '.join(wrong[:12])}. Expected a "
            f"state_dict, alone or under {' or '.join(WRAPPERS)}."
        )
    if found and all(name.startswith(PARALLEL_PREFIX) for name in found):
        found = {name.removeprefix(PARALLEL_PREFIX): value for name, value in found.items()}
    return {
        name: value.astype(np.float32) if value.dtype.kind in "fV" else value
        for name, value in found.items()
    }


def _read_safetensors(path: Path, contents: bytes) -> State:
    reader = _safetensors()
    try:
        return reader.load(contents)
    except Exception as error:  # whatever a broken file makes the reader raise
        raise DataError(f"{path} is not a readable .safetensors file: {error}") from error


def _read_pickle(path: Path, contents: bytes) -> Mapping[str, Any]:
    torch = _torch()
    try:
        found = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can make it raise anything
        # Not PyTorch's own message, which says how to load the file in spite of it.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run code ({wanted[1]})" if wanted else "it is none, or damaged"
        raise DataError(
            f"{path} was not loaded as a PyTorch weight file: {reason}. Ask for a "
            ".safetensors, or, if you trust it, save its weights alone with "
            "torch.save(model.state_dict(), FILE)."
        ) from error
    if not isinstance(found, Mapping):
        raise DataError(f"{path} holds a {type(found).__name__}, not a state_dict.")

    def arrays(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            str(name): array(value) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }

    def array(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    for wrapper in WRAPPERS:
        if isinstance(found.get(wrapper), Mapping):
            return {wrapper: arrays(found[wrapper])}
    return arrays(found)


def save_weights(path: Path, state: State) -> None:
    """Write a weight file, of the kind its name ends with, atomically.

    Raises:
        ConfigError: the name ends with none of .pth, .pt and .safetensors, or the extra
            `[torch]` is not installed.
        DataError: it cannot be written there.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in state.items()}
    arrays = {name: value.reshape(state[name].shape) for name, value in arrays.items()}
    if path.suffix == ".safetensors":
        contents = _safetensors().save(arrays)
    elif path.suffix in (".pth", ".pt"):
        torch = _torch()
        buffer = io.BytesIO()
        torch.save({n: torch.from_numpy(v.copy()) for n, v in arrays.items()}, buffer)
        contents = buffer.getvalue()
    else:
        raise ConfigError(
            f"{path} ends with {path.suffix!r}, but must end with .pth, .pt or .safetensors."
        )
    try:
        write_atomically(path, contents)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}.") from error
