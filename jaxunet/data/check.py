"""What must be true of an image and its mask, tested on the decoded pixels.

Problems are returned as sentences that name the file, not raised: a person with forty bad
files wants one list, not forty runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from jaxunet.data.images import read_image, read_mask, read_reduced_image
from jaxunet.data.sources import Pair, SourceFile
from jaxunet.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Decoded:
    """A pair that passed every check."""

    id: str
    image_file: bytes
    image: UInt8[np.ndarray, "_ _ 3"]
    """Of the mask's size, or a fraction of it."""
    mask: UInt8[np.ndarray, "height width 1"]
    """0 or 255."""


def check_pair(
    pair: Pair, *, binarize: bool = False, side: int | None = None
) -> Decoded | list[str]:
    """Decode a pair, or say everything that is wrong with it.

    With `side`, to which the image will be resized, a large JPEG is decoded at a fraction of
    its size; see `read_reduced_image`.

    Checked: both files read (CRC, in a zip) and decode to the end, the mask has a single
    channel with only 0 and 255 (anything, with `binarize`), and the sizes agree. An EXIF
    orientation is applied before sizes are compared.
    """
    problems: list[str] = []

    def attempt(decode: Callable[[SourceFile], T], file: SourceFile) -> T | None:
        try:
            return decode(file)
        except DataError as error:
            problems.append(str(error))
            return None

    def decode_image(file: SourceFile) -> tuple[bytes, np.ndarray, tuple[int, int]]:
        contents, name = file.read(), str(file)
        if side is None:
            image = read_image(contents, name=name)
            return contents, image, (image.shape[0], image.shape[1])
        return contents, *read_reduced_image(contents, side, name=name)

    def decode_mask(file: SourceFile) -> np.ndarray:
        return read_mask(file.read(), binarize=binarize, name=str(file))

    decoded = attempt(decode_image, pair.image)
    mask = attempt(decode_mask, pair.mask)
    if decoded is None or mask is None:
        return problems
    contents, image, (height, width) = decoded
    if (height, width) != mask.shape[:2]:
        mask_height, mask_width = mask.shape[:2]
        return [
            f"{pair.mask} is {mask_width} x {mask_height} pixels, but its image {pair.image} "
            f"is {width} x {height}."
        ]
    return Decoded(pair.id, contents, image, mask)


def report(where: object, problems: list[str]) -> str:
    """One message for all problems found in a dataset, a line each."""
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return "\n".join([f"{count} found in {where}; nothing was prepared.", *problems])
