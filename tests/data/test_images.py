import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxunet.config import MAX_MEGAPIXELS
from jaxunet.data.images import (
    encode_png,
    read_image,
    read_reduced_image,
    resize_image,
    resize_mask,
)
from jaxunet.data.masks import read_mask
from jaxunet.errors import DataError


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: decoding it would fail."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


RED_OVER_BLUE = np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8)


def test_greyscale_becomes_three_equal_channels() -> None:
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    expected = np.stack([grey] * 3, axis=-1)
    assert np.array_equal(read_image(saved(Image.fromarray(grey))), expected)


def test_sixteen_bit_image_is_scaled_rather_than_clipped() -> None:
    sixteen = np.array([[0, 257 * 100, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 100, 255]], np.uint8)[:, :, None], 3, axis=2)
    assert np.array_equal(read_image(saved(Image.fromarray(sixteen))), expected)


def test_palette_alpha_and_cmyk_become_rgb() -> None:
    colours = Image.fromarray(RED_OVER_BLUE)
    palette = colours.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_image(saved(palette)), RED_OVER_BLUE)
    assert np.array_equal(read_image(saved(colours.convert("RGBA"))), RED_OVER_BLUE)
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert np.array_equal(read_image(saved(cmyk, "TIFF"))[0, 0], [255, 0, 0])


def test_exif_orientation_turns_the_image_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must turn clockwise
    turned = read_image(saved(Image.fromarray(RED_OVER_BLUE), exif=exif.tobytes()))
    assert np.array_equal(turned, [[[0, 0, 255], [255, 0, 0]]])


def test_reads_from_a_path(tmp_path: Path) -> None:
    Image.fromarray(RED_OVER_BLUE).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), RED_OVER_BLUE)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    limit = f"the limit is {MAX_MEGAPIXELS},000,000. Save it smaller, or raise --data.max-meg"
    with pytest.raises(DataError, match=f"20000 x 20000 = 400,000,000 pixels; {limit}"):
        read_image(header_only_png(20_000, 20_000))
    with pytest.raises(DataError, match=r"= 1,000,000 pixels; the limit is 0"):
        read_mask(header_only_png(1000, 1000), max_megapixels=0)


@pytest.mark.filterwarnings("error")
def test_what_telephones_take_is_within_the_limit_and_the_limit_can_be_raised() -> None:
    # Without pixels they can only fail in decoding, so the limit let them pass; Pillow, which
    # would warn from 89 megapixels on and refuse from 179, did so too, and has its own again.
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(header_only_png(12_032, 9024))
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(header_only_png(16_320, 12_240), max_megapixels=200)
    assert before is not None
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("brand", "kind"), [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF")]
)
def test_a_telephones_kind_of_file_is_named_whatever_it_is_called(
    tmp_path: Path, brand: bytes, kind: str
) -> None:
    contents = b"\0\0\0\x18ftyp" + brand + bytes(100)
    (tmp_path / "a.jpg").write_bytes(contents)
    for source in (contents, tmp_path / "a.jpg"):
        with pytest.raises(DataError, match=f"is {kind}, which is not read here. Save it as"):
            read_image(source)


def test_the_largest_official_size_is_within_the_limit() -> None:
    # Without pixels it can only fail in decoding, so the limit let it pass.
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(header_only_png(6748, 4499))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_an_error_that_names_the_file(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    contents = saved(Image.fromarray(noise), kind)
    (tmp_path / "cut.img").write_bytes(contents[: len(contents) // 2])
    with pytest.raises(DataError, match=r"cut\.img cannot be decoded"):
        read_image(tmp_path / "cut.img")


def test_what_is_no_image_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"notes\.jpg is not an image"):
        read_image(tmp_path / "notes.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg does not exist"):
        read_image(tmp_path / "gone.jpg")


def test_mask_keeps_its_values_and_gains_a_channel() -> None:
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    assert np.array_equal(read_mask(saved(Image.fromarray(mask))), mask[:, :, None])
    assert np.array_equal(read_mask(saved(Image.fromarray(mask > 0))), mask[:, :, None])
    palette = Image.fromarray(mask).convert("P")
    assert np.array_equal(read_mask(saved(palette)), mask[:, :, None])


VALUES = np.array([[0, 0, 1, 1], [0, 0, 0, 1]], np.uint8)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (VALUES, "1 as lesion"),
        (VALUES * 100, "100 as lesion"),
        (VALUES * np.uint16(257), "257 as lesion"),
        (VALUES * np.uint16(65_535), "65535 as lesion"),
        (np.array([[0, 127, 128, 255], [30, 0, 16, 200]], np.uint8), "values above 127 as"),
        (
            np.array([[0, 32_767, 32_768, 65_535], [30, 0, 255, 40_000]], np.uint16),
            "values above 32,767 as lesion",
        ),
    ],
)
def test_other_values_are_refused_or_with_binarize_taken_as_the_message_says(
    mask: np.ndarray, rule: str
) -> None:
    contents = saved(Image.fromarray(mask))
    with pytest.raises(
        DataError, match=rf"holds the values 0, .*--data\.binarize to take {rule}"
    ):
        read_mask(contents)
    found = read_mask(contents, binarize=True)
    assert (found.dtype, found.shape) == (np.uint8, (2, 4, 1))
    assert np.array_equal(found[:, :, 0], VALUES * 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_saved_in_colour_is_refused_or_with_binarize_taken(mode: str) -> None:
    grey = Image.fromarray(VALUES * np.uint8(255))
    contents = saved(grey.convert(mode))
    with pytest.raises(DataError, match=rf"'{mode}' \(\d channels\).*pass --data\.binarize"):
        read_mask(contents)
    assert np.array_equal(read_mask(contents, binarize=True)[:, :, 0], VALUES * 255)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [30, 95])
def test_a_jpeg_mask_is_cut_where_it_was_sharp(mode: str, quality: int) -> None:
    sharp = np.kron(VALUES, np.full((16, 16), 255, np.uint8))
    contents = saved(Image.fromarray(sharp).convert(mode), "JPEG", quality=quality)
    assert np.array_equal(read_mask(contents, binarize=True)[:, :, 0], sharp)
    # No lesion stays none: JPEG keeps an even picture as it is.
    empty = saved(Image.fromarray(0 * sharp).convert(mode), "JPEG", quality=quality)
    assert not read_mask(empty, binarize=True).any()


@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(RED_OVER_BLUE), "'RGB' and colours that differ"),
        (Image.fromarray(RED_OVER_BLUE).convert("P"), "a palette and colours that differ"),
        (Image.new("RGBA", (2, 2), (255, 255, 255, 128)), "is transparent in parts"),
        (Image.new("CMYK", (2, 2)), "'CMYK', but a mask is a single channel"),
        (Image.fromarray(np.array([[0, 1, 2]], np.uint8)), "0, 1, 2, .*of several classes"),
    ],
)
def test_masks_that_nothing_says_how_to_read_stay_refused(
    image: Image.Image, reason: str, binarize: bool
) -> None:
    with pytest.raises(DataError, match=reason):
        read_mask(saved(image, "TIFF"), binarize=binarize)


def test_resizing_an_image_averages_what_it_covers() -> None:
    # Antialiasing: a fine checkerboard becomes grey, where sampling would keep extremes.
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = resize_image(np.stack([board] * 3, axis=-1), 8, 16)
    assert small.shape == (8, 16, 3)
    assert np.abs(small.astype(int) - 127).max() <= 8


def test_resizing_a_mask_adds_no_values() -> None:
    mask = np.random.default_rng(0).choice([0, 255], (37, 53, 1)).astype(np.uint8)
    small = resize_mask(mask, 16, 20)
    assert small.shape == (16, 20, 1)
    assert set(np.unique(small)) <= {0, 255}


def test_png_is_lossless() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 7, 3), (5, 7, 1)):
        array = rng.integers(0, 256, shape).astype(np.uint8)
        with Image.open(io.BytesIO(encode_png(array))) as image:
            assert image.format == "PNG"
            assert np.array_equal(np.array(image).reshape(shape), array)


def photograph(width: int, height: int, **options: object) -> bytes:
    """A JPEG with soft forms, fine noise and sharp dark lines, as of skin with hairs."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(60, 220, (12, 16, 3), np.uint8))
    pixels = np.array(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels += rng.normal(0, 4, pixels.shape)
    for x in range(50, width - 50, width // 10):
        pixels[:, x : x + 8] *= 0.4
    return saved(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "JPEG", **options)


def test_a_large_jpeg_is_decoded_smaller_and_comes_out_the_same():
    contents = photograph(2500, 1700, quality=92)
    reduced, size = read_reduced_image(contents, 256)
    assert size == (1700, 2500)
    assert reduced.shape == (850, 1250, 3)
    difference = np.abs(
        resize_image(reduced, 256, 256).astype(int)
        - resize_image(read_image(contents), 256, 256)
    )
    assert difference.max() <= 2
    assert difference.mean() < 0.15


@pytest.mark.parametrize("side", [256, 40])
def test_a_reduced_image_is_never_below_twice_the_side_it_is_for(side):
    for width, height in ((511, 512), (1023, 700), (1024, 1100)):
        contents = photograph(width, height)
        reduced, size = read_reduced_image(contents, side)
        assert size == (height, width)
        assert min(reduced.shape[:2]) >= min(2 * side, width, height)
        if min(size) < 4 * side:
            np.testing.assert_array_equal(reduced, read_image(contents))


def test_a_reduced_image_is_turned_upright_with_its_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = photograph(1201, 1200, exif=exif)
    reduced, size = read_reduced_image(contents, 100)
    assert size == read_image(contents).shape[:2] == (1201, 1200)
    assert reduced.shape == (301, 300, 3)


def test_a_truncated_jpeg_is_refused_however_small_it_is_decoded():
    contents = photograph(1200, 900)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_reduced_image(contents[: len(contents) // 2], 100, name="x.jpg")


def test_a_png_is_decoded_whole():
    pixels = np.zeros((900, 1000, 3), np.uint8)
    reduced, size = read_reduced_image(encode_png(pixels), 100)
    assert reduced.shape[:2] == size == (900, 1000)
