"""Tensors out of weight files: `.safetensors`, and what holds for those of a `.pth` as well."""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxunet.errors import ConfigError, DataError, shown

# By safetensors' names.
_TYPES: dict[str, Any] = {f"F{bits}": f"<f{bits // 8}" for bits in (64, 32, 16)}
_TYPES |= {
    f"{sign}{8 * size}": f"<{sign.lower()}{size}" for sign in "IU" for size in (8, 4, 2, 1)
}
_TYPES |= {
    "BOOL": "?",
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}


def safetensors_module() -> ModuleType:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError(
            "safetensors is not installed, and these weights need it. Install it: python -m "
            "pip install safetensors."
        ) from error
    return safetensors


def is_safetensors(contents: bytes) -> bool:
    """Whether a file begins as one: a JSON header's length in eight bytes, then the header."""
    return contents[8:9] == b"{" and int.from_bytes(contents[:8], "little") <= len(contents)


def read_safetensors(path: Path, contents: bytes) -> dict[str, np.ndarray]:
    """The tensors of a `.safetensors`, of the types that they are stored in.

    Raises:
        DataError: it is damaged, or holds tensors of another type.
        ConfigError: safetensors is not installed.
    """
    reader = safetensors_module()
    try:
        tensors = reader.deserialize(contents)
    except Exception as error:  # whatever a broken file makes the reader raise
        raise DataError(f"{path} is not a readable .safetensors file: {error}") from error
    found = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _TYPES:
            raise DataError(
                f"{path}: {shown(name)} is of type {tensor['dtype']}; known: "
                f"{', '.join(_TYPES)}."
            )
        values = np.frombuffer(tensor["data"], _TYPES[tensor["dtype"]])
        found[name] = values.reshape(tensor["shape"])
    return found


def check_size(path: Path, contents: bytes, sizes: Iterable[int]) -> None:
    """That tensors of so many bytes each take no more than the file that they are in.

    Raises:
        DataError: they would.
    """
    if (declared := sum(sizes)) > len(contents):
        raise DataError(
            f"{path} has {len(contents)} bytes, but its tensors would take {declared}: they "
            "repeat values instead of holding them. Save them anew, each after .contiguous()."
        )


def in_float32(value: np.ndarray) -> np.ndarray:
    """Floating-point values as float32, where too large ones are infinite; others as is."""
    with np.errstate(over="ignore"):
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        return value.astype(np.float32) if floating else value
