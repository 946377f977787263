"""Weight files of encoders, `.pth` and `.safetensors`, as NumPy arrays by their names.

What kind of file it is shows in its content. No code of it runs: see `pickles`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxunet.errors import DataError
from jaxunet.pretrained.pickles import NotPlain, Tensor, read_pickle
from jaxunet.pretrained.tensors import check_size, in_float32, is_safetensors, read_safetensors

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
        DataError: it is neither kind, damaged, holds more than tensors, or tensors that would
            take more memory than its length.
        ConfigError: it is a .safetensors, and safetensors is not installed.
    """
    if is_safetensors(contents):
        tensors = read_safetensors(path, contents)
        return {name.removeprefix(PREFIX): in_float32(value) for name, value in tensors.items()}
    if contents[257:262] == b"ustar":
        raise DataError(
            f"{path} is a file of PyTorch before 0.1.10, a tar archive. Save its weights anew: "
            "torch.save(torch.load(FILE), OTHER)."
        )
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
    views = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    check_size(path, contents, (view.nbytes for view in views.values()))
    try:
        return {
            str(name).removeprefix(PREFIX): in_float32(view.array())
            for name, view in views.items()
        }
    except ValueError as error:
        raise DataError(f"{path} is a damaged weight file: {error}.") from error
