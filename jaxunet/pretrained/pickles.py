"""PyTorch's pickles read without PyTorch, and without running what is in them.

A pickle may call whatever it names. This reader knows the names of a state_dict (tensors of
plain types in plain containers) and refuses every other before it is called. Until
`Tensor.array` is called, a file takes no more memory than a few times its length.

    before PyTorch 1.6   five pickles one after another: a magic number, a version, the system,
                         the object, the keys of its storages; then each storage's length and
                         values
    since                a zip without compression: `*/data.pkl` the object, `*/data/KEY` values
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
_TYPES: dict[str, Any] = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class NotPlain(ValueError):
    """A pickle that holds more than tensors in plain containers; says what."""


@dataclass(frozen=True)
class _Type:
    dtype: Any


@dataclass
class _Storage:
    """The values that tensors are views of; they come after the pickle."""

    dtype: np.dtype
    count: int
    values: np.ndarray | None = None


@dataclass
class Tensor:
    """A view of a storage: what `torch._utils._rebuild_tensor_v2` is told."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def array(self) -> np.ndarray:
        """Its values.

        Raises:
            ValueError: it reaches beyond its storage, or is larger than it.
        """
        values, sides = self.storage.values, self.shape
        if values is None:
            raise ValueError("a tensor's values are missing")
        count = math.prod(sides)
        last = sum((n - 1) * step for n, step in zip(sides, self.strides, strict=True))
        if count and (count > values.size or self.offset + last >= values.size):
            raise ValueError("a tensor reaches beyond its values")
        steps = tuple(step * values.itemsize for step in self.strides)
        view = values[self.offset :] if count else values[:0]
        return np.lib.stride_tricks.as_strided(view, sides, steps, writeable=False).copy()


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_hooks: Any
) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers):
        raise NotPlain("a tensor of something else than numbers")
    if min(numbers) < 0:
        raise NotPlain("a tensor with a negative side")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,  # before PyTorch 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): _Type(dtype) for name, dtype in _TYPES.items()},
}


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storage: Callable[[Any], _Storage]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise NotPlain(f"it asks for {module}.{name}"[:120]) from None

    def persistent_load(self, saved: Any) -> _Storage:
        return self._storage(saved)


def _load(file: io.BytesIO, storage: Callable[[Any], _Storage]) -> Any:
    """One pickle, which stands next in `file`."""
    start, size = file.tell(), len(file.getbuffer())
    for opcode, argument, _ in pickletools.genops(file):
        # The reader makes room for as many as the largest of these numbers.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > size:
            raise NotPlain("a place beyond its length")
    file.seek(start)
    return _Reader(file, storage).load()


class _Storages:
    """The storages that a pickle speaks of, by their keys."""

    def __init__(self, limit: int):
        self.found: dict[str, _Storage] = {}
        self._limit = limit

    def __call__(self, saved: Any) -> _Storage:
        kind, type_, key, _, count, *view = saved
        if kind != "storage" or not isinstance(type_, _Type) or any(view):
            raise NotPlain("storages of another kind")
        dtype = np.dtype(type_.dtype)
        if type(count) is not int or not 0 <= count * dtype.itemsize <= self._limit:
            raise NotPlain("more values than bytes")
        return self.found.setdefault(str(key), _Storage(dtype, count))


def read_pickle(contents: bytes) -> Mapping[Any, Any]:
    """The dictionary that a .pth file holds; its tensors are `Tensor`.

    Raises:
        NotPlain: it holds more than tensors in plain containers.
        Exception: it is none, or damaged.
    """
    storages = _Storages(len(contents))
    if contents.startswith(b"PK\x03\x04"):
        found = _read_zip(contents, storages)
    else:
        found = _read_legacy(io.BytesIO(contents), storages)
    if not isinstance(found, Mapping):
        raise NotPlain(f"a {type(found).__name__}, not a state_dict")
    return found


def _read_zip(contents: bytes, storages: _Storages) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(contents))
    members = archive.namelist()
    if sum(member.file_size for member in archive.infolist()) > len(contents):
        raise NotPlain("more than its length, compressed")
    pickled = [name for name in members if name.endswith("/data.pkl")]
    if len(pickled) != 1 or any(name.endswith("/constants.pkl") for name in members):
        raise NotPlain("a TorchScript archive")
    found = _load(io.BytesIO(archive.read(pickled[0])), storages)
    folder = pickled[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in members and archive.read(order) != b"little":
        raise NotPlain("values of a big-endian machine")
    for key, storage in storages.found.items():
        values = archive.read(f"{folder}data/{key}")
        storage.values = np.frombuffer(values, storage.dtype, storage.count)
    return found


def _read_legacy(file: io.BytesIO, storages: _Storages) -> Any:
    magic, _version, system = (_load(file, storages) for _ in range(3))
    if magic != MAGIC or system.get("little_endian") is not True:
        raise NotPlain("something else than a state_dict")
    found, keys = _load(file, storages), _load(file, storages)
    for key in keys:
        storage = storages.found[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.count:
            raise NotPlain("storages of other lengths than it says")
        values = file.read(count * storage.dtype.itemsize)
        storage.values = np.frombuffer(values, storage.dtype, count)
    return found
