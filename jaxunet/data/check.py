"""What must be true of an image and its mask, tested on the decoded pixels.

Problems are returned as sentences that name the file, not raised: a person with forty bad
files wants one list, not forty runs.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from jaxunet.config import IGNORED
from jaxunet.data.images import (
    is_stored_on_its_side,
    read_image,
    read_reduced_image,
    resize_mask,
)
from jaxunet.data.masks import read_mask
from jaxunet.data.sources import Pair
from jaxunet.errors import DataError

T = TypeVar("T")

LISTED = 50
"""Problems of one kind that are listed one by one."""


@dataclass(frozen=True)
class Decoded:
    """A pair that passed every check."""

    id: str
    image_file: bytes
    image: UInt8[np.ndarray, "_ _ 3"]
    """Of the mask's size, or a fraction of it."""
    mask: UInt8[np.ndarray, "height width 1"]
    """0 or 255, or `IGNORED`."""


def check_pair(pair: Pair, *, side: int | None = None) -> Decoded | list[str]:
    """Decode a pair, or say everything that is wrong with it.

    With `side`, to which the image will be resized, a large JPEG is decoded at a fraction of
    its size; see `read_reduced_image`.

    Checked: both files read (CRC, in a zip) and decode to the end, neither is larger than the
    pair's `max_megapixels`, the mask has a single channel with only 0 and 255 (or is what
    `read_mask` takes with the pair's `binarize` and `ignore_value`), some of its pixels count
    (after resizing too, with `side`), and the sizes agree. An EXIF orientation is applied
    before sizes are compared.
    """
    problems: list[str] = []

    def attempt(decode: Callable[[], T]) -> T | None:
        try:
            return decode()
        except DataError as error:
            problems.append(str(error))
            return None

    def decode_image() -> tuple[bytes, np.ndarray, tuple[int, int]]:
        contents, name, limit = pair.image.read(), str(pair.image), pair.max_megapixels
        if side is None:
            image = read_image(contents, name=name, max_megapixels=limit)
            return contents, image, (image.shape[0], image.shape[1])
        return contents, *read_reduced_image(contents, side, name=name, max_megapixels=limit)

    decoded = attempt(decode_image)
    mask = attempt(partial(decode_mask, pair))
    if decoded is None or mask is None:
        return problems
    contents, image, size = decoded
    if problem := sizes_differ(pair, lambda: contents, size, (mask.shape[0], mask.shape[1])):
        return [problem]
    if (
        side is not None
        and pair.ignore_value is not None
        and (resize_mask(mask, side, side) == IGNORED).all()
    ):
        return [
            f"Of {pair.mask} no pixel that counts is left at {side} x {side}: nothing can be "
            "learnt from it or scored. Take it away, and its image, or raise data.stored_size."
        ]
    return Decoded(pair.id, contents, image, mask)


def decode_mask(pair: Pair) -> UInt8[np.ndarray, "height width 1"]:
    """The pair's mask, 0, 255 or `IGNORED`, whether to train on or to score by it.

    Raises:
        DataError: it cannot be read (`read_mask`), or none of its pixels counts.
    """
    mask = read_mask(
        pair.mask.read(),
        binarize=pair.binarize,
        ignore_value=pair.ignore_value,
        name=str(pair.mask),
        max_megapixels=pair.max_megapixels,
    )
    if (mask == IGNORED).all():
        raise DataError(
            f"{pair.mask} holds nothing but {pair.ignore_value}, which data.ignore_value says "
            "does not count, so that nothing can be learnt from it or scored. Take it away, "
            "and its image."
        )
    return mask


def sizes_differ(
    pair: Pair,
    contents: Callable[[], bytes],
    size: tuple[int, int],
    mask_size: tuple[int, int],
) -> str | None:
    """What is wrong if an image and its mask differ in size, which are heights and widths.

    Args:
        contents: gives the image's file, whose EXIF was applied to `size`.
    """
    if size == mask_size:
        return None
    (height, width), (mask_height, mask_width) = size, mask_size
    problem = (
        f"{pair.mask} is {mask_width} x {mask_height} pixels, but its image {pair.image} is "
        f"{width} x {height}"
    )
    if not is_stored_on_its_side(contents()):
        return f"{problem}."
    fits = "as the mask is" if (width, height) == mask_size else "and so is neither"
    return (
        f"{problem} once it is turned upright as its EXIF orientation says; its pixels are "
        f"stored as {height} x {width}, {fits}. Draw the mask on the upright image, or turn "
        "the mask, or take the orientation out of the image."
    )


def report(where: object, problems: list[str], so: str = "nothing was prepared") -> str:
    """One message for all problems found in a dataset, a line each.

    Of one kind, the same but for names and numbers, only the first `LISTED` are shown: where
    every file has the same fault, one line for each would hide what it is.
    """
    kinds: Counter[str] = Counter()
    lines = []
    for problem in problems:
        kind = re.sub(r"\S*[/\d]\S*", "", problem)
        kinds[kind] += 1
        if kinds[kind] <= LISTED:
            lines.append(problem)
    if left := len(problems) - len(lines):
        lines.append(f"And {left:,} more of the same kind{'s' * (len(kinds) > 1)}.")
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return "\n".join([f"{count} found in {where}; {so}.", *lines])
