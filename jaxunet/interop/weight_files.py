"""PyTorch weight files (`.pth`, `.pt`, `.safetensors`) to and from NumPy arrays.

A file from a stranger takes no more memory than its own length: what it declares is compared
with that before anything is made. Nor does it run code: see `jaxunet.interop.pickles`.
"""

import io
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxunet.errors import ConfigError, DataError, shown
from jaxunet.files import write_atomically
from jaxunet.interop.layouts import prefixes
from jaxunet.interop.pickles import read_pickle, torch_module
from jaxunet.pretrained.sources import digest
from jaxunet.pretrained.tensors import (
    check_size,
    in_float32,
    is_safetensors,
    read_safetensors,
    safetensors_module,
)

State = dict[str, np.ndarray]

IGNORED = ("mask_values",)
"""Entries that are no weights and are left out: milesial/Pytorch-UNet notes the values that
its masks had."""
WRAPPERS = ("state_dict", "model_state_dict")
"""Keys under which training scripts keep the weights, beside averaged ones and the like. They
go before other dictionaries; of those, exactly one must hold weights."""


@dataclass(frozen=True)
class Weights:
    """What was taken from a weight file.

    Attributes:
        state: tensors by the layout's own names; floating-point ones are float32.
        dictionary: the key, or keys with dots between, of the dictionary they stood in.
        prefix: what stood before each name.
        left_out: entries of that dictionary without the prefix: no part of the network.
        sha256: of the file.
    """

    state: State
    dictionary: str
    prefix: str
    left_out: list[str]
    sha256: str


def load_weights(path: Path) -> Weights:
    """The network's tensors in a weight file; what kind of file it is shows in its content.

    Half-precision tensors become float32, which loses nothing; float64 ones too, and are
    rounded.

    Raises:
        DataError: the file is not there, is neither kind, would run code or take more memory
            than its length, holds several networks, or something that is no tensor.
        ConfigError: PyTorch or safetensors, which it needs, is not installed.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise DataError(f"{path} cannot be read: it is a device or a pipe, not a file.")
        contents = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if is_safetensors(contents):
        found: Mapping[Any, Any] = read_safetensors(path, contents)
    else:
        found = read_pickle(path, contents)
    where, prefix, values = _network(path, found)
    names = [name for name in values if name not in IGNORED]
    left_out = [_text(name) for name in names if not _starts(name, prefix)]
    inside = [name for name in names if _starts(name, prefix)]
    wrong = [_text(n) for n in inside if not (isinstance(n, str) and _is_tensor(values[n]))]
    if wrong:
        raise DataError(
            f"{path} holds entries that are no tensors: {', '.join(wrong[:12])}. Expected a "
            "state_dict, alone or in a dictionary."
        )
    taken = {name[len(prefix) :]: values[name] for name in inside}
    check_size(path, contents, (value.nbytes for value in taken.values()))
    state = {name: _array(path, name, value) for name, value in taken.items()}
    return Weights(state, where, prefix, left_out, digest(contents))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "is_floating_point")


def _starts(name: Any, prefix: str) -> bool:
    return not prefix or (isinstance(name, str) and name.startswith(prefix))


def _text(name: Any) -> str:
    return shown(name) if isinstance(name, str) else f"<{type(name).__name__}>"


def _array(path: Path, name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        try:
            value = (value.float() if value.is_floating_point() else value).numpy(force=True)
        except (RuntimeError, TypeError) as error:  # types that are there to be stored only
            raise DataError(
                f"{path}: {shown(name)} is {value.dtype}, which has no values to read; save "
                "it as float32."
            ) from error
    return in_float32(value)


def _network(path: Path, found: Mapping[Any, Any]) -> tuple[str, str, Mapping[Any, Any]]:
    """The one dictionary and prefix with tensors of a known layout; else the outermost."""
    places = [
        (where, prefix, values)
        for where, values in _dictionaries(found)
        for prefix in prefixes(
            name
            for name, value in values.items()
            if isinstance(name, str) and _is_tensor(value)
        )
    ]
    for wrapper in WRAPPERS:
        places = [place for place in places if place[0] == wrapper] or places
    if len(places) > 1:
        named = [
            shown(".".join(filter(None, place[:2]))) or "no name at all" for place in places
        ]
        raise DataError(
            f"{path} holds the weights of {len(places)} networks, under "
            f"{', '.join(named[:6])}. Save the one that you mean alone: "
            "torch.save(its state_dict, FILE)."
        )
    return places[0] if places else ("", "", _unwrapped(found))


def _unwrapped(found: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """What to speak of where no known weights are."""
    wrapped = [found[w] for w in WRAPPERS if isinstance(found.get(w), Mapping)]
    return wrapped[0] if wrapped else found


def _dictionaries(found: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """`found` and every dictionary in it, each once (a pickle may hold circles)."""
    seen, waiting = set(), [("", found)]
    while waiting:
        where, values = waiting.pop()
        if id(values) in seen:
            continue
        seen.add(id(values))
        yield where, values
        waiting += [
            (f"{where}.{_text(name)}" if where else _text(name), value)
            for name, value in values.items()
            if isinstance(value, Mapping)
        ]


def unwritable(folder: Path) -> str:
    """What keeps `folder` from being made or written to, told without doing so; else ''."""
    try:
        there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
        if not there.is_dir():
            return f"{there} is no directory"
        return "" if os.access(there, os.W_OK) else f"{there} may not be written to"
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return str(error.strerror)


def check_target(path: Path) -> None:
    """That `save_weights` can write `path`, as far as it can be known before.

    Raises:
        ConfigError: the name ends with none of .pth, .pt and .safetensors, or what it needs
            is not installed.
        DataError: it cannot be written there.
    """
    if path.suffix == ".safetensors":
        safetensors_module()
    elif path.suffix in (".pth", ".pt"):
        torch_module()
    else:
        raise ConfigError(
            f"{path} ends with {path.suffix!r}, but must end with .pth, .pt or .safetensors."
        )
    reason = "it is a directory" if path.is_dir() else unwritable(path.parent)
    if reason:
        raise DataError(f"{path} cannot be written: {reason}.")


def save_weights(path: Path, state: State) -> None:
    """Write a weight file, of the kind its name ends with, atomically.

    Raises:
        ConfigError, DataError: as `check_target`.
    """
    check_target(path)
    arrays = {name: np.ascontiguousarray(value) for name, value in state.items()}
    arrays = {name: value.reshape(state[name].shape) for name, value in arrays.items()}
    if path.suffix == ".safetensors":
        contents = safetensors_module().numpy.save(arrays)
    else:
        torch = torch_module()
        buffer = io.BytesIO()
        torch.save({n: torch.from_numpy(v.copy()) for n, v in arrays.items()}, buffer)
        contents = buffer.getvalue()
    try:
        write_atomically(path, contents)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}.") from error
