"""Image and mask files to uint8 arrays and back, with Pillow.

Worker processes import this, so it needs NumPy and Pillow and no framework.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import ExifTags, Image, ImageOps

from jaxunet.errors import DataError

MAX_PIXELS = 80_000_000
"""Largest image that is decoded, width times height. Above it a file is refused before
decoding: a few kilobytes of PNG can claim gigabytes of pixels. The largest official ISIC
2018 image has 30 million pixels."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file's name says. Pillow knows more, but would hand an EPS to
Ghostscript, a program of its own, to be run."""

# What Pillow's decoders are known to raise on damaged input, beside OSError.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def read_image(
    source: bytes | Path, *, name: str | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image file to uint8 RGB, `[height, width, 3]`.

    The EXIF orientation is applied. Greyscale, palette, CMYK and 16-bit images become
    8-bit RGB; an alpha channel is dropped. Of several frames or pages the first is taken.

    Args:
        source: the file, or its contents.
        name: what errors call the image when `source` is bytes.

    Raises:
        DataError: the file is not an image of one of `FORMATS`, is damaged or truncated, has
            more than `MAX_PIXELS` pixels, or a pixel format whose range is not known.
    """
    with _decoded(source, name) as (image, label, _):
        return _rgb(image, label)


def read_reduced_image(
    source: bytes | Path, side: int, *, name: str | None = None
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """Decode an image that will be resized to `side`, in less time where that is safe.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as that leaves it at least
    `2 * side` both ways. Resized to `side` afterwards, the result differs from the full
    decode's by less than 0.5 of 255 in the mean, and by 8 at most (tested; images of 6
    megapixels and more by 0.13 and 2).

    Returns:
        uint8 RGB, and the image's own height and width. EXIF is applied to both.

    Raises:
        DataError: as for `read_image`.
    """
    with _decoded(source, name, at_least=2 * side) as (image, label, size):
        return _rgb(image, label), size


def _rgb(image: Image.Image, label: str) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = _eight_bits(image)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{label} has pixels of type {image.mode!r} (32 bits), whose range is not "
            "known. Save it with 8 or 16 bits per channel."
        )
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(
    source: bytes | Path, *, binarize: bool = False, name: str | None = None
) -> UInt8[np.ndarray, "height width 1"]:
    """Decode a mask file to uint8, `[height, width, 1]`, lesion 255 and background 0.

    In a 16-bit file, too, the values 0 and 255 alone mean background and lesion.

    Args:
        source: the file, or its contents.
        binarize: accept any 8- or 16-bit values, as lesion where above 127 of 255.
        name: what errors call the mask when `source` is bytes.

    Raises:
        DataError: the file is no readable image (as for `read_image`), has more than one
            channel, or values other than 0 and 255, which are named; with `binarize`, its
            only value beside 0 is not above 127, so that all of it would be background.
    """
    with _decoded(source, name) as (image, label, _):
        if image.mode == "P":
            image = _grey_palette(image, label)
        if image.mode == "1":
            image = image.convert("L")
        if image.mode != "L" and not image.mode.startswith("I;16"):
            channels = len(image.getbands())
            raise DataError(
                f"{label} has pixels of type {image.mode!r} ({channels} "
                f"channel{'s' * (channels > 1)}), but a mask is a single channel of 8 bits. "
                "Save it as greyscale."
            )
        values = _values(image)
        pixels = np.array(image)
        if set(values) <= {0, 255}:
            return pixels.astype(np.uint8)[:, :, np.newaxis]
        found = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        if image.mode != "L":
            pixels = _eight_bits(image)
        # One value beside 0 is a label, such as 1; several are the grey of a soft or
        # compressed mask, which may well hold no lesion.
        if pixels.max() <= 127 and len(set(values) - {0}) == 1:
            raise DataError(
                f"{label} holds the values {found}, but a mask holds only 0 and 255. None is "
                "above 127, so --data.binarize would leave no lesion: save it with 255 where "
                "the lesion is."
            )
        if not binarize:
            raise DataError(
                f"{label} holds the values {found}, but a mask holds only 0 and 255. "
                "Pass --data.binarize to take values above 127 as lesion."
            )
        return np.where(pixels > 127, 255, 0).astype(np.uint8)[:, :, np.newaxis]


def resize_image(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resize uint8 `[h, w, 3]` to `[height, width, 3]`: bilinear, antialiased."""
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)


def resize_mask(
    mask: UInt8[np.ndarray, "h w 1"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 1"]:
    """Resize uint8 `[h, w, 1]` to `[height, width, 1]`: nearest, so values are kept."""
    resized = Image.fromarray(mask[:, :, 0]).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized)[:, :, np.newaxis]


def encode_png(array: UInt8[np.ndarray, "..."] | UInt16[np.ndarray, "h w"]) -> bytes:
    """PNG file of RGB `[h, w, 3]` or grey `[h, w, 1]` or `[h, w]`; uint16 is 16 bits deep."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    buffer = io.BytesIO()
    # A third of the time of zlib's default level, for files a tenth larger.
    Image.fromarray(array).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


@contextmanager
def _decoded(
    source: bytes | Path, name: str | None, *, at_least: int | None = None
) -> Iterator[tuple[Image.Image, str, tuple[int, int]]]:
    """The decoded, upright image with its name and its own size, errors as `DataError`.

    With `at_least` a JPEG may be decoded smaller, but no smaller than that.
    """
    label = name or (str(source) if isinstance(source, Path) else "The image")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise DataError(
                    f"{label} is {image.width} x {image.height} = {pixels:,} pixels; the "
                    f"limit is {MAX_PIXELS:,}."
                )
            if image.format == "PNG":
                _check_sums(source)
            height, width = image.height, image.width
            if at_least is not None:
                image.draft(image.mode, (at_least, at_least))  # JPEG only; others ignore it
            image.load()
            lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            ImageOps.exif_transpose(image, in_place=True)
            yield image, label, (width, height) if lies_on_its_side else (height, width)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit strikes while opening, before the size can be asked for.
        [size] = re.findall(r"\((\d+) pixels\)", str(error))
        raise DataError(
            f"{label} has {int(size):,} pixels; the limit is {MAX_PIXELS:,}."
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{label} does not exist.") from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise DataError(f"{label} is not an image of a kind read here: {known}.") from error
    except DAMAGE as error:
        raise DataError(f"{label} cannot be decoded: {error}.") from error


def _check_sums(source: bytes | Path) -> None:
    """Check a PNG's CRCs, which decoding it does not do: damage would become other pixels."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.verify()


def _eight_bits(image: Image.Image) -> np.ndarray:
    """A 16-bit single-channel image scaled to uint8, 65535 to 255."""
    values = np.array(image).astype(np.uint32)
    return ((values + 128) // 257).astype(np.uint8)


def _values(image: Image.Image) -> list[int]:
    """Distinct values of a single-channel image, in order."""
    if image.mode == "L":
        # A histogram is linear in the pixels; np.unique would sort millions of them.
        return [value for value, count in enumerate(image.histogram()) if count]
    return [int(value) for value in np.unique(np.array(image))]


def _grey_palette(image: Image.Image, label: str) -> Image.Image:
    """A palette image as greyscale, if all colours it uses are grey."""
    red, green, blue = image.convert("RGB").split()
    if red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes():
        raise DataError(
            f"{label} has a palette of colours, but a mask is a single channel with only "
            "0 and 255. Save it as greyscale."
        )
    return red
