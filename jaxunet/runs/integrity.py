"""Whether a checkpoint holds what was saved: checksum, shapes, JSON that can be read."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunet.learning.steps import TrainState


def other_arrays(found: TrainState, like: TrainState) -> list[str]:
    """The arrays of `found` that have not the shape and type of those of `like`, in words."""
    expected = jax.tree_util.tree_leaves_with_path(like)
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} is "
        f"{x.dtype}{list(x.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
        for (path, leaf), x in zip(expected, jax.tree.leaves(found), strict=True)
        if (x.shape, x.dtype) != (leaf.shape, leaf.dtype)
    ]


def checksum_of(arrays: Any, progress: dict[str, Any] | None = None) -> int:
    """CRC-32 of the progress and of every array of a tree, such as a `TrainState`."""
    checksum = zlib.crc32(json.dumps(progress or {}, sort_keys=True).encode())
    for leaf in jax.tree.leaves(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, checksum)
    return checksum


def json_damage(path: Path) -> str:
    """What is wrong with a file that should hold a JSON object; nothing if it does, or is
    not there."""
    try:
        if isinstance(json.loads(path.read_bytes()), dict):
            return ""
        return f"{path.name} holds no JSON object"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError) as error:
        return f"{path.name} cannot be read ({error})"
