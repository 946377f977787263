"""Mask files to uint8: lesion 255, background 0, and `IGNORED` where a pixel doesn't count."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxunet.config import IGNORED, MAX_MEGAPIXELS
from jaxunet.data.images import decoded
from jaxunet.errors import DataError


def read_mask(
    source: bytes | Path,
    *,
    binarize: bool = False,
    ignore_value: int | None = None,
    name: str | None = None,
    max_megapixels: int = MAX_MEGAPIXELS,
) -> UInt8[np.ndarray, "height width 1"]:
    """Decode a mask file to uint8, `[height, width, 1]`, lesion 255 and background 0.

    A mask has one channel of 8 or 16 bits (or a palette of greys) that holds 0 and 255 alone.
    With `binarize` it may be saved in colour too, if all channels are equal and nothing is
    transparent, and may hold any values:

    - one value beside 0: it is the lesion, whatever it is;
    - several: they are greys, of a soft mask or a compressed one, and cut at half of the
      range of their type. Lesion is above 127 of 8 bits and above 32,767 of 16 bits.

    Pixels of `ignore_value` become `IGNORED`, and what is said above holds for the others;
    but greys are refused then, for one of them may have that value by chance.

    Args:
        source: the file, or its contents.
        binarize: take such masks.
        ignore_value: of pixels that don't count; None: there are none.
        name: what errors call the mask when `source` is bytes.
        max_megapixels: a larger mask is refused.

    Raises:
        DataError: the file is no readable image (as for `read_image`), is none of these
            masks, or holds several values below 16, which are numbers of classes and not
            greys. The message says so where `binarize` would take it.
    """
    with decoded(source, name, max_megapixels=max_megapixels) as (image, label, _):
        image = _one_channel(image, label, binarize)
        values = _values(image)
        pixels = np.array(image)[:, :, np.newaxis]
        if {value for value in values if value != ignore_value} <= {0, 255}:
            mask = pixels.astype(np.uint8)
        else:
            lesion_above = _lesion_above(label, image.mode, values, binarize, ignore_value)
            mask = np.where(pixels > lesion_above, 255, 0).astype(np.uint8)
        if ignore_value in values:
            mask[pixels == ignore_value] = IGNORED
        return mask


def _lesion_above(
    label: str, mode: str, values: list[int], binarize: bool, ignore_value: int | None
) -> int:
    """The value above which a mask of other `values` than 0 and 255 is lesion.

    Raises:
        DataError: none is, or none without `binarize`.
    """
    found = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    allowed = "only 0 and 255"
    if ignore_value is not None:
        allowed += f", and {ignore_value} where data.ignore_value says so"
    wrong = f"{label} holds the values {found}, but a mask holds {allowed}."
    beside_zero = [value for value in values if value not in (0, ignore_value)]
    half = 127 if mode == "L" else 32_767
    if len(beside_zero) == 1:
        rule, lesion_above = f"{beside_zero[0]} as lesion", 0
    elif ignore_value is not None:
        raise DataError(
            f"{wrong} Of several greys one may be {ignore_value} by chance: save it without "
            "them, and not as JPEG."
        )
    elif beside_zero[-1] < 16:
        raise DataError(
            f"{wrong} These are the numbers of several classes, and which of them is the "
            "lesion cannot be told: save it with 255 where the lesion is."
        )
    else:
        rule, lesion_above = f"values above {half:,} as lesion", half
    if not binarize:
        marked = (
            ", or name by --data.ignore-value which of them marks pixels that don't count"
            if len(beside_zero) == 2
            else ""
        )
        raise DataError(f"{wrong} Pass --data.binarize to take {rule}{marked}.")
    return lesion_above


def _one_channel(image: Image.Image, label: str, binarize: bool) -> Image.Image:
    """A mask as greyscale of 8 or 16 bits.

    Raises:
        DataError: it has colours, or is saved in colour and `binarize` is not set.
    """
    if image.mode == "L" or image.mode.startswith("I;16"):
        return image
    if image.mode == "1":
        return image.convert("L")
    wrong = f"{label} has pixels of type {image.mode!r}"
    if image.mode not in ("P", "PA", "LA", "RGB", "RGBA"):
        raise DataError(
            f"{wrong}, but a mask is a single channel of 8 bits. Save it as greyscale."
        )
    *colours, alpha = image.convert("RGBA").split()
    if image.mode == "P":
        wrong = f"{label} has a palette"
    elif image.mode in ("PA", "LA", "RGBA") and alpha.getextrema() != (255, 255):
        raise DataError(
            f"{wrong} and is transparent in parts, so that what is lesion cannot be told. Save "
            "it as greyscale, without transparency."
        )
    first = colours[0].tobytes()
    if any(colour.tobytes() != first for colour in colours[1:]):
        raise DataError(
            f"{wrong} and colours that differ, but a mask is a single channel with only 0 and "
            "255. Save it as greyscale."
        )
    if image.mode != "P" and not binarize:
        raise DataError(
            f"{wrong} ({len(image.getbands())} channels), but a mask is a single channel of 8 "
            "bits. Its channels are equal: pass --data.binarize to take it."
        )
    return colours[0]


def _values(image: Image.Image) -> list[int]:
    """Distinct values of a single-channel image, in order."""
    if image.mode == "L":
        # A histogram is linear in the pixels; np.unique would sort millions of them.
        return [value for value, count in enumerate(image.histogram()) if count]
    return [int(value) for value in np.unique(np.array(image))]
