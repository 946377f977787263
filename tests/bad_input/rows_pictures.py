"""Rows of the table: pictures and masks, each as training pair b of a dataset of one's own."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from ground import SIDE, World
from PIL import Image
from rows import Refused, Row, Taken, prepared_as
from small_data import encoded, half_mask, picture

IMAGE = picture(0, SIDE, SIDE)
MASK = half_mask(SIDE, SIDE)
BLOCKS = np.kron(np.array([[0, 255], [255, 255]], np.uint8), np.ones((8, 8), np.uint8))
RED = np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8)
GREY = IMAGE[:, :, 0]
TURN_RIGHT = 6  # EXIF: the camera was held so that the picture must turn clockwise


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned(array: np.ndarray) -> bytes:
    """A PNG of `array` that says it is to be turned to the right."""
    exif = Image.Exif()
    exif[0x0112] = TURN_RIGHT
    return saved(array, exif=exif.tobytes())


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG from its parts, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def rgb16(array: np.ndarray) -> bytes:
    """A PNG of 48 bits a pixel, the value v as 257 v."""
    height, width, _ = array.shape
    wide = (array.astype(">u2") * 257).astype(">u2")
    return png(width, height, 16, 2, b"".join(b"\0" + row.tobytes() for row in wide))


def flipped(contents: bytes, place: float) -> bytes:
    at = int(len(contents) * place)
    return contents[:at] + bytes([contents[at] ^ 0xFF]) + contents[at + 1 :]


def truncated(contents: bytes) -> bytes:
    return contents[: len(contents) // 2]


def masked(values: list[int]) -> np.ndarray:
    """A mask whose columns hold these values in turn."""
    return np.resize(np.array(values, np.uint8), (SIDE, SIDE))


def image_row(
    name: str,
    contents: Callable[[], bytes],
    outcome: Refused | Taken,
    mask: bytes | None = None,
    suffix: str = ".png",
) -> Row:
    def command(world: World) -> list[object]:
        world.pair(contents(), encoded(MASK) if mask is None else mask, suffix=suffix)
        return world.prepare_command("folder")

    return Row(name, command, outcome)


def mask_row(
    name: str, contents: Callable[[], bytes], outcome: Refused | Taken, *options: str
) -> Row:
    def command(world: World) -> list[object]:
        world.pair(encoded(IMAGE), contents())
        return world.prepare_command("folder", *options)

    return Row(name, command, outcome)


def broken(message: str, file: str = r"own/train/images/b\.png") -> Refused:
    return Refused(rf"1 problem found in own; nothing was prepared\. {file} {message}")


def broken_mask(message: str) -> Refused:
    return broken(message, r"own/train/masks/b\.png")


def palette(array: np.ndarray, **options: object) -> bytes:
    colours = Image.fromarray(array).convert("P", palette=Image.Palette.ADAPTIVE)
    return saved(colours, **options)


ROWS = [
    # Damaged, or no picture at all.
    image_row(
        "truncated JPEG",
        lambda: truncated(saved(picture(0, 64, 64), "JPEG")),
        broken("cannot be decoded: image file is truncated", r"own/train/images/b\.jpg"),
        suffix=".jpg",
    ),
    image_row("truncated PNG", lambda: truncated(encoded(IMAGE)), broken("cannot be decoded")),
    image_row(
        "PNG with a flipped byte",
        lambda: flipped(encoded(IMAGE), 0.5),
        broken("cannot be decoded: broken PNG file"),
    ),
    image_row(
        "empty file", lambda: b"", broken("is not an image of a kind read here: BMP, .*PNG")
    ),
    image_row("text named .png", lambda: b"<html>Not found</html>", broken("is not an image")),
    image_row(
        "EPS, which Pillow would have Ghostscript run",
        lambda: saved(IMAGE, "EPS"),
        broken("is not an image of a kind read here"),
    ),
    image_row(
        "extension of no image",
        lambda: encoded(IMAGE),
        Refused(r"1 problem .*own/train/masks/b\.png has no image in own/train/images"),
        suffix=".txt",
    ),
    image_row(
        "32-bit pixels of unknown range",
        lambda: saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        broken(r"has pixels of type 'F' \(32 bits\).*Save it with 8", r"own/.*/b\.tif"),
        suffix=".tif",
    ),
    # Too large.
    image_row(
        "decompression bomb of 20,000 x 20,000 pixels",
        lambda: png(20_000, 20_000, 8, 2, b""),
        broken("is 20000 x 20000 = 400,000,000 pixels; the limit is 128,000,000. Save it"),
    ),
    image_row(
        "12,000 x 12,000 pixels",
        lambda: png(12_000, 12_000, 8, 2, b""),
        broken("is 12000 x 12000 = 144,000,000 pixels; the limit is 128,000,000"),
    ),
    # Unusual, but a picture.
    image_row("PNG named .jpg", lambda: encoded(IMAGE), prepared_as("b", IMAGE), suffix=".jpg"),
    image_row(
        "16-bit greyscale PNG",
        lambda: saved(GREY.astype(np.uint16) * 257),
        prepared_as("b", np.dstack([GREY] * 3)),
    ),
    image_row("16-bit RGB PNG", lambda: rgb16(IMAGE), prepared_as("b", IMAGE)),
    image_row(
        "CMYK JPEG",
        lambda: saved(Image.new("CMYK", (SIDE, SIDE), (0, 0, 0, 255)), "JPEG"),
        prepared_as("b", 0 * RED),
        suffix=".jpg",
    ),
    image_row(
        "palette PNG",
        lambda: palette(RED),
        prepared_as("b", RED),
    ),
    image_row(
        "palette PNG with transparency",
        lambda: palette(RED, transparency=0),
        prepared_as("b", RED),
    ),
    image_row(
        "RGBA PNG",
        lambda: saved(Image.fromarray(IMAGE).convert("RGBA")),
        prepared_as("b", IMAGE),
    ),
    image_row("greyscale PNG", lambda: encoded(GREY), prepared_as("b", np.dstack([GREY] * 3))),
    image_row(
        "greyscale PNG with alpha",
        lambda: saved(Image.fromarray(GREY).convert("LA")),
        prepared_as("b", np.dstack([GREY] * 3)),
    ),
    image_row(
        "EXIF rotation", lambda: turned(IMAGE), prepared_as("b", np.rot90(IMAGE, -1), MASK)
    ),
    image_row(
        "EXIF rotation, mask not turned",
        lambda: turned(picture(0, SIDE, 2 * SIDE)),
        Refused(
            r"masks/b\.png is 32 x 16 pixels, but its image .*images/b\.png is 16 x 32 once it "
            "is turned upright as its EXIF .* stored as 32 x 16, as the mask is"
        ),
        mask=encoded(half_mask(SIDE, 2 * SIDE)),
    ),
    image_row(
        "EXIF block of garbage",
        lambda: saved(IMAGE, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"),
        prepared_as("b", IMAGE),
    ),
    image_row(
        "1 x 1 pixel",
        lambda: encoded(RED[:1, :1]),
        prepared_as("b", RED, np.full((SIDE, SIDE), 255, np.uint8)),
        mask=encoded(np.array([[255]], np.uint8)),
    ),
    # Masks.
    mask_row("truncated mask", lambda: encoded(MASK)[:60], broken_mask("cannot be decoded")),
    mask_row(
        "mask of 0 and 1",
        lambda: encoded(MASK // 255),
        broken_mask(r"holds the values 0, 1, but .* Pass --data\.binarize to take 1 as lesion"),
    ),
    mask_row(
        "mask of 0 and 1, binarized",
        lambda: encoded(MASK // 255),
        prepared_as("b", mask=MASK, binarize=True),
        "--data.binarize",
    ),
    mask_row(
        "mask of 0 and 128",
        lambda: encoded(MASK // 255 * 128),
        broken_mask("holds the values 0, 128, but .* Pass --data.binarize"),
    ),
    mask_row(
        "mask of 0 and 128, binarized",
        lambda: encoded(MASK // 255 * 128),
        prepared_as("b", mask=MASK, binarize=True),
        "--data.binarize",
    ),
    mask_row(
        "mask of 0, 254 and 255",
        lambda: encoded(masked([0, 254, 255])),
        broken_mask("holds the values 0, 254, 255, but .* Pass --data.binarize"),
    ),
    mask_row(
        "mask of 0, 254 and 255, binarized",
        lambda: encoded(masked([0, 254, 255])),
        prepared_as("b", mask=masked([0, 255, 255]), binarize=True),
        "--data.binarize",
    ),
    mask_row(
        "RGB mask",
        lambda: encoded(np.dstack([MASK] * 3)),
        broken_mask(r"has pixels of type 'RGB' \(3 channels\), .* --data\.binarize to take it"),
    ),
    mask_row(
        "RGB mask, binarized",
        lambda: encoded(np.dstack([MASK] * 3)),
        prepared_as("b", mask=MASK, binarize=True),
        "--data.binarize",
    ),
    mask_row(
        "mask of several classes, binarized",
        lambda: encoded(masked([0, 1, 2])),
        broken_mask("holds the values 0, 1, 2, but .*several classes.* with 255 where the"),
        "--data.binarize",
    ),
    mask_row(
        "RGBA mask",
        lambda: saved(Image.fromarray(MASK).convert("RGBA")),
        broken_mask(r"has pixels of type 'RGBA' \(4 channels\)"),
    ),
    mask_row(
        "palette mask with colours",
        lambda: palette(RED),
        broken_mask("has a palette and colours that differ.* Save it as greyscale"),
    ),
    mask_row(
        "palette mask of black and white",
        lambda: saved(Image.fromarray(MASK).convert("P")),
        prepared_as("b", mask=MASK),
    ),
    mask_row("1-bit mask", lambda: saved(MASK > 0), prepared_as("b", mask=MASK)),
    mask_row(
        "16-bit mask of 0 and 255",
        lambda: saved(MASK.astype(np.uint16)),
        prepared_as("b", mask=MASK),
    ),
    mask_row(
        "16-bit mask of 0 and 65535",
        lambda: saved(MASK.astype(np.uint16) * 257),
        broken_mask("holds the values 0, 65535, but .* Pass --data.binarize"),
    ),
    mask_row(
        "JPEG mask with its noise",
        lambda: saved(masked([0, 255, 0]), "JPEG", quality=30),
        broken_mask("holds the values 0, .* Pass --data.binarize to take values above 127"),
    ),
    mask_row(
        "JPEG mask with its noise, binarized",
        lambda: saved(BLOCKS, "JPEG", quality=30),
        prepared_as("b", mask=BLOCKS, binarize=True),
        "--data.binarize",
    ),
    mask_row(
        "mask of another size",
        lambda: encoded(half_mask(SIDE, SIDE + 1)),
        broken_mask(r"is 17 x 16 pixels, but its image .*b\.png is 16 x 16"),
    ),
    mask_row("empty mask", lambda: encoded(0 * MASK), prepared_as("b", mask=0 * MASK)),
    mask_row("full mask", lambda: encoded(MASK | 255), prepared_as("b", mask=MASK | 255)),
]
