"""Image files to uint8 arrays and back, with Pillow; masks are read by `masks`.

`decoded` is the one door through which a picture of a user's is opened: it knows which kinds
are decoded, how large a picture may be, and what is wrong with a file that is refused.

Worker processes import this, so it needs NumPy and Pillow and no framework.
"""

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import ExifTags, Image, ImageOps

from jaxunet.config import MAX_MEGAPIXELS
from jaxunet.errors import DataError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file's name says. Pillow knows more, but would hand an EPS to
Ghostscript, a program of its own, to be run."""

_UNREAD = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
"""By the brand in the first bytes: kinds that cameras write and that are not decoded."""

ADVICE = {
    "HEIC": "Save it as JPEG or PNG; an iPhone takes JPEGs when its camera's format is set to "
    "'Most Compatible'.",
}
"""What to do with a file of a kind that is not decoded, where there is more to say than
`SAVE_IT`."""
SAVE_IT = "Save it as JPEG or PNG."


class TooLarge(DataError):
    """A picture has more pixels than were allowed; there is nothing wrong with it."""


_opening = threading.Lock()

# What Pillow's decoders are known to raise on damaged input, beside OSError.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def read_image(
    source: bytes | Path, *, name: str | None = None, max_megapixels: int = MAX_MEGAPIXELS
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image file to uint8 RGB, `[height, width, 3]`.

    The EXIF orientation is applied. Greyscale, palette, CMYK and 16-bit images become
    8-bit RGB; an alpha channel is dropped. Of several frames or pages the first is taken.

    Args:
        source: the file, or its contents.
        name: what errors call the image when `source` is bytes.
        max_megapixels: a larger image is refused.

    Raises:
        DataError: the file is not an image of one of `FORMATS`, is damaged or truncated, is
            too large, or has a pixel format whose range is not known.
    """
    with decoded(source, name, max_megapixels=max_megapixels) as (image, label, _):
        return _rgb(image, label)


def read_reduced_image(
    source: bytes | Path,
    side: int,
    *,
    name: str | None = None,
    max_megapixels: int = MAX_MEGAPIXELS,
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
    reduced = decoded(source, name, max_megapixels=max_megapixels, at_least=2 * side)
    with reduced as (image, label, size):
        return _rgb(image, label), size


def lies_on_its_side(image: Image.Image) -> bool:
    """Whether EXIF says to turn the image by a quarter, so that its sides change places."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) > 4


def is_stored_on_its_side(contents: bytes) -> bool:
    """`lies_on_its_side` for a file that could be decoded before."""
    with _open(contents) as image:
        return lies_on_its_side(image)


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
def decoded(
    source: bytes | Path,
    name: str | None = None,
    *,
    max_megapixels: int = MAX_MEGAPIXELS,
    at_least: int | None = None,
) -> Iterator[tuple[Image.Image, str, tuple[int, int]]]:
    """The decoded, upright image with its name and its own height and width.

    With `at_least` a JPEG may be decoded smaller, but no smaller than that.

    Raises:
        DataError: as for `read_image`.
    """
    label = name or (str(source) if isinstance(source, Path) else "The image")
    try:
        with _open(source) as image:
            pixels = image.width * image.height
            if pixels > max_megapixels * 1_000_000:
                raise TooLarge(
                    f"{label} is {image.width} x {image.height} = {pixels:,} pixels; the "
                    f"limit is {max_megapixels * 1_000_000:,}. Save it smaller, or raise "
                    "--data.max-megapixels if that much memory is there for it."
                )
            if image.format == "PNG":
                # Decoding does not check a PNG's CRCs: damage would become other pixels.
                with _open(source) as again:
                    again.verify()
            height, width = image.height, image.width
            if at_least is not None:
                image.draft(image.mode, (at_least, at_least))  # JPEG only; others ignore it
            image.load()
            size = (width, height) if lies_on_its_side(image) else (height, width)
            ImageOps.exif_transpose(image, in_place=True)
            yield image, label, size
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{label} does not exist.") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{label} {_unknown(source)}") from error
    except (Image.DecompressionBombError, *DAMAGE) as error:
        raise DataError(f"{label} cannot be decoded: {error}.") from error


def _open(source: bytes | Path) -> Image.Image:
    """`Image.open` for the kinds that are decoded here, without its own limit of pixels.

    That is one number for the whole program and cannot be passed; it warns from 89 megapixels
    on and refuses from 179. The caller asks for the size, and has a limit to be set.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _unknown(source: bytes | Path) -> str:
    """What a file is that is not decoded, and what to do with it."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    else:
        start = source[:12]
    kind = _UNREAD.get(start[8:12]) if start[4:8] == b"ftyp" else None
    if kind is None:
        return f"is not an image of a kind read here: {', '.join(FORMATS)}."
    return f"is {kind}, which is not read here. {ADVICE.get(kind, SAVE_IT)}"


def _eight_bits(image: Image.Image) -> np.ndarray:
    """A 16-bit single-channel image scaled to uint8, 65535 to 255."""
    values = np.array(image).astype(np.uint32)
    return ((values + 128) // 257).astype(np.uint8)
