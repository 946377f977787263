"""Weights that fit an encoder tensor for tensor and were trained for another.

timm has two networks of each EfficientNet-Lite: `tf_efficientnet_lite0` is TensorFlow's, which
ours is, and `efficientnet_lite0` (weights `ra_in1k`) is timm's own, with other padding and
pictures normalised by ImageNet's mean and standard deviation. Their tensors have the same names
and shapes, so the wrong ones load, and say nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxunet.errors import DataError
from jaxunet.model.encoders.registry import LITES
from jaxunet.model_config import EncoderName

_NAME = re.compile(r"(?<!tf_)efficientnet_lite\d[._]ra(?![a-z])")
_SHA256 = "37913777"
"""How the SHA-256 of `efficientnet_lite0_ra-37913777.pth` begins: PyTorch's files say it."""
_FOLDERS = 3
"""The hub's cache has the repository's name so many folders above a file."""

LARGEST_SPREAD = 0.8
"""Between the two: of TensorFlow's Lite 0 to 2 it is 0.52 to 0.53; the same pictures have 1.15
to 1.18 when normalised by ImageNet's mean and standard deviation. Between -1 and 1, as
TensorFlow has them, more is hardly possible: 1 is half black and half white."""
_BLURS = 8


def check_origin(
    encoder: EncoderName, variables: Mapping[str, Any], path: Path, sha256: str
) -> None:
    """That a file's weights of an EfficientNet-Lite are TensorFlow's kind.

    They show in the file's name or digest, or in `spread_of_pictures`.

    Args:
        variables: `params` and `batch_stats` of the encoder, made of the file.

    Raises:
        DataError: they are timm's own kind.
    """
    if encoder not in LITES:
        return
    names = (path.name, *(folder.name for folder in path.absolute().parents[:_FOLDERS]))
    spread = spread_of_pictures(variables)
    if sha256.startswith(_SHA256) or any(map(_NAME.search, names)):
        why = "its name or its SHA-256 says so"
    elif spread is not None and spread > LARGEST_SPREAD:
        why = (
            f"its first layer has seen pictures of standard deviation {spread:.2f}, as "
            "normalising by ImageNet's makes them, where TensorFlow's saw 0.5"
        )
    else:
        return
    raise DataError(
        f"{path} fits {encoder}, but was trained for timm's own network of that name, with "
        f"other padding and normalisation ({why}): it would load, and be wrong. Give timm's "
        f"tf_{encoder}, or model.weights 'imagenet'."
    )


def spread_of_pictures(variables: Mapping[str, Any]) -> float | None:
    """The standard deviation of the pictures that a trained encoder saw, after normalisation.

    Neighbouring pixels and the three colours hardly differ, so a kernel that blurs gives a
    picture times the sum of its weights; batch norm has kept the variance of the result. The
    median over the eight kernels that blur most; None if fewer than half of these have any
    variance, as in weights that were never trained.
    """
    kernel = np.asarray(variables["params"]["stem"]["kernel"], np.float64)
    variance = np.asarray(variables["batch_stats"]["stem_norm"]["var"], np.float64)
    total, power = kernel.sum((0, 1, 2)), (kernel**2).sum((0, 1, 2))
    alive = np.flatnonzero((variance > 1e-6) & (power > 0))
    blurs = alive[np.argsort(-(total[alive] ** 2) / power[alive])][:_BLURS]
    if len(blurs) < _BLURS / 2:
        return None
    return float(np.median(np.sqrt(variance[blurs]) / np.abs(total[blurs])))
