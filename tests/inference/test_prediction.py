"""Prediction with a fake model: a pixel's probability is its red value / 255."""

import errno
import os
import re
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from jaxunet.errors import DataError, RunError
from jaxunet.inference.challenge import zip_masks
from jaxunet.inference.pictures import MASK_SUFFIX, OVERLAY_SUFFIX, PROBABILITY_SUFFIX, plan
from jaxunet.inference.prediction import (
    mask_at_size,
    predict_files,
    predict_image,
    probabilities_at_size,
)
from jaxunet.learning.clean_up import clean_up

NAME_MAX = 255  # bytes of a file name on Linux and macOS
SETTINGS = {"image_size": 16, "threshold": 0.5, "batch_size": 4}


def red(images):
    return images[..., :1].astype(np.float32) / 255


def predict(model, inputs, out, *, recursive=False, **options):
    """Plan and predict with small settings, as predict.py does."""
    kinds = {"overlay": OVERLAY_SUFFIX, "probabilities": PROBABILITY_SUFFIX}
    suffixes = (MASK_SUFFIX, *(suffix for name, suffix in kinds.items() if options.get(name)))
    found = plan(inputs, out, suffixes=suffixes, recursive=recursive)
    return predict_files(model, found.pictures, **SETTINGS, **options)


def left_half(height, width, colour=(255, 0, 0)):
    """A picture whose left half is `colour`, the rest black."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = colour
    return image


def left_half_mask(height, width):
    return np.where(np.arange(width) < width // 2, 255, 0)[None].repeat(height, axis=0)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read_png(path):
    """Mode and pixels as Pillow sees them."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.mode, np.array(image)


def bilinear(values, height, width):
    """Separable bilinear interpolation between pixel centres, upwards, in float64."""
    rows, columns = values.shape
    y = (np.arange(height) + 0.5) * rows / height - 0.5
    x = (np.arange(width) + 0.5) * columns / width - 0.5
    across = np.array([np.interp(x, np.arange(columns), row) for row in values])
    return np.array([np.interp(y, np.arange(rows), column) for column in across.T]).T


# One picture


@pytest.mark.parametrize(("height", "width"), [(40, 60), (7, 30), (16, 16), (301, 150)])
def test_mask_has_the_pictures_own_size_and_place(height, width):
    mask = predict_image(red, left_half(height, width), image_size=16, threshold=0.5)
    np.testing.assert_array_equal(mask, left_half_mask(height, width))


def test_one_pixel_is_predicted():
    lesion, skin = np.full((1, 1, 3), 200, np.uint8), np.zeros((1, 1, 3), np.uint8)
    assert predict_image(red, lesion, image_size=16, threshold=0.5).tolist() == [[255]]
    assert predict_image(red, skin, image_size=16, threshold=0.5).tolist() == [[0]]


def test_only_a_probability_above_the_threshold_is_lesion():
    image = np.full((4, 4, 3), 51, np.uint8)
    at = float(np.float32(51) / np.float32(255))
    assert predict_image(red, image, image_size=4, threshold=at).max() == 0
    assert predict_image(red, image, image_size=4, threshold=at - 1e-6).min() == 255


def test_probabilities_are_interpolated_between_pixel_centres():
    values = np.random.default_rng(0).random((9, 7)).astype(np.float32)
    expected = bilinear(values.astype(np.float64), 2500, 40)  # three bands
    clear = abs(expected - 0.5) > 1e-4
    mask = mask_at_size(values, 2500, 40, 0.5)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(mask[clear], np.where(expected > 0.5, 255, 0)[clear])


def test_probabilities_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 12, 16, 1\).*\(1, 16, 16, 3\)"):
        predict_image(lambda x: red(x)[:, 2:-2], left_half(8, 8), image_size=16, threshold=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_probability_that_is_not_finite_is_an_error_that_names_the_picture(value, tmp_path):
    """An empty mask, as a comparison with NaN would give, says that there is no lesion."""

    def overflows(images):
        found = red(images)
        found[found[:, 8, 0, 0] > 0.9, 0, 0] = value
        return found

    save(tmp_path / "in" / "good.png", left_half(8, 8, (200, 0, 0)))
    bright = save(tmp_path / "in" / "second.png", left_half(8, 8))
    with pytest.raises(RunError, match=r"makes of the picture is not finite"):
        predict_image(overflows, left_half(8, 8), image_size=16, threshold=0.5)
    with pytest.raises(RunError, match=re.escape(f"makes of {bright} is not finite")):
        predict(overflows, [tmp_path / "in"], tmp_path / "out")


def test_clean_up_fills_holes_and_keeps_the_largest_component():
    def drawn(*lines):
        return np.array([[255 * (pixel == "#") for pixel in line] for line in lines], np.uint8)

    before = drawn(
        "###....#",
        "#.#..#..",  # the ring has fewer pixels than the bar until its hole is filled
        "###.....",
        "...#....",  # touches the ring at a corner
        "........",
        "########",
        "........",
    )
    after = drawn(
        "###.....",
        "###.....",
        "###.....",
        "...#....",
        "........",
        "........",
        "........",
    )
    np.testing.assert_array_equal(clean_up(before), after)
    assert clean_up(np.zeros((3, 3), np.uint8)).max() == 0


# Files


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("a.jpg", left_half(40, 60)),
        ("a.png", left_half(40, 60)),
        ("a.png", left_half(40, 60)[..., 0]),
        ("a.png", np.dstack([left_half(40, 60), np.full((40, 60), 90, np.uint8)])),
    ],
    ids=["jpeg", "png", "greyscale", "rgba"],
)
def test_each_kind_of_picture_gives_a_single_channel_mask(tmp_path, name, picture):
    source = save(tmp_path / name, picture)
    report = predict(red, [source], tmp_path / "out")
    assert report.written == [tmp_path / "out" / "a_segmentation.png"]
    mode, mask = read_png(report.written[0])
    assert mode == "L"
    np.testing.assert_array_equal(mask, left_half_mask(40, 60))


def test_mask_of_an_exif_rotated_photo_fits_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: its left half is shown at the top
    source = save(tmp_path / "photo.jpg", left_half(20, 60), exif=exif, quality=95)
    report = predict(red, [source], tmp_path / "out", overlay=True)
    _, mask = read_png(report.written[0])
    expected = np.zeros((60, 20))
    expected[:30] = 255
    np.testing.assert_array_equal(mask, expected)
    _, overlay = read_png(tmp_path / "out" / "photo_overlay.png")
    assert overlay.shape == (60, 20, 3)
    assert overlay[10, 10, 0] > 240
    assert overlay[50, 10, 0] < 15


def test_the_last_batch_is_filled_up_and_each_mask_is_its_own(tmp_path):
    for number in range(10):  # shades from 15 to 240: above one half from number 5 on
        picture = np.full((8, 8 + number, 3), 15 + 25 * number, np.uint8)
        save(tmp_path / f"{number}.png", picture)
    shapes = []

    def counting(images):
        shapes.append(images.shape)
        return red(images)

    report = predict(counting, [tmp_path], tmp_path / "out")
    assert shapes == [(4, 16, 16, 3)] * 3
    assert [p.name for p in report.written] == [f"{n}_segmentation.png" for n in range(10)]
    for number, path in enumerate(report.written):
        mask = read_png(path)[1]
        assert mask.shape == (8, 8 + number)
        assert np.unique(mask).tolist() == [255 if number >= 5 else 0]


def test_a_file_that_is_no_image_is_reported_and_the_others_are_done(tmp_path):
    text, absent, broken = (tmp_path / n for n in ("notes.txt", "absent.jpg", "broken.jpg"))
    text.write_text("not a picture")
    whole = save(tmp_path / "whole.jpg", left_half(64, 64))
    broken.write_bytes(whole.read_bytes()[:400])
    other = save(tmp_path / "other.png", left_half(9, 9))
    inputs = [text, whole, absent, broken, other]
    report = predict(red, inputs, tmp_path / "out")
    assert [path for path, _ in report.failed] == [text, absent, broken]
    assert all(path.name in reason for path, reason in report.failed)
    names = ["other_segmentation.png", "whole_segmentation.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert sorted(p.name for p in report.written) == names


def test_pictures_of_one_name_are_refused_before_any_work(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "a.jpg"
    save(first, left_half(8, 8))
    save(second, left_half(8, 8))

    def never(images):
        raise AssertionError("the model was asked")

    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png"):
        predict(never, [tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_named_twice_is_done_once(tmp_path):
    source = save(tmp_path / "a.png", left_half(8, 8))
    again = tmp_path / ".." / tmp_path.name / "a.png"
    found = plan([source, tmp_path, again], tmp_path / "out", suffixes=())
    assert [picture.source for picture in found.pictures] == [source]


def test_a_result_never_replaces_an_input(tmp_path):
    picture = save(tmp_path / "a.png", left_half(8, 8))
    victim = save(tmp_path / "a_segmentation.png", left_half(8, 8))
    before = victim.read_bytes()
    with pytest.raises(DataError, match=r"a_segmentation\.png"):
        predict(red, [picture, victim], tmp_path)
    assert victim.read_bytes() == before


def test_results_in_the_same_folder_are_not_taken_for_pictures_the_next_time(tmp_path):
    save(tmp_path / "a.png", left_half(8, 8))
    kinds = {"overlay": True, "probabilities": True}
    predict(red, [tmp_path], tmp_path, **kinds)
    predict(red, [tmp_path], tmp_path, **kinds)
    names = ["a.png", "a_overlay.png", "a_probability.png", "a_segmentation.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert [p.name for p in plan([tmp_path], tmp_path, suffixes=()).results] == names[1:]


def test_what_of_a_folder_is_no_picture_is_passed_over_by_name(tmp_path):
    names = ["._a.jpg", "a.JPG", "a_superpixels.png", "d.heic", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "below.png").mkdir()
    found = plan([tmp_path], tmp_path / "out", suffixes=())
    assert [each.source.name for each in found.pictures] == ["a.JPG"]
    assert [p.name for p in found.results] == ["._a.jpg", "a_superpixels.png"]
    assert [p.name for p in found.others] == ["d.heic", "notes.txt"]
    file = tmp_path / "a_superpixels.png"  # a file is taken as it is
    assert plan([file], tmp_path / "out", suffixes=()).pictures[0].source == file


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.gif", "GIF"), ("a.jp2", "JPEG2000")],
        *[("a.ppm", "PPM"), ("a.bmp", "BMP"), ("a.webp", "WEBP"), ("a.tif", "TIFF")],
    ],
)
def test_every_kind_that_can_be_decoded_is_found_in_a_folder(tmp_path, name, kind):
    save(tmp_path / name, left_half(40, 60), format=kind)
    report = predict(red, [tmp_path], tmp_path / "out")
    assert report.written == [tmp_path / "out" / "a_segmentation.png"]
    np.testing.assert_array_equal(read_png(report.written[0])[1], left_half_mask(40, 60))


def test_folders_below_keep_their_structure_and_a_circle_ends(tmp_path):
    folder = tmp_path / "in"
    (folder / "x" / "y").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a.png", "x/a.png", "x/y/b.png", ".hidden/c.png"):
        save(folder / name, left_half(8, 8))
    (folder / "x" / "back").symlink_to(folder)
    (folder / "z").symlink_to(folder / "x" / "y")
    report = predict(red, [folder], tmp_path / "out", recursive=True)
    names = ["a_segmentation.png", "x/a_segmentation.png", "x/y/b_segmentation.png"]
    assert report.written == [tmp_path / "out" / name for name in names]
    assert all(path.exists() for path in report.written)
    flat = predict(red, [folder], tmp_path / "flat")
    assert flat.written == [tmp_path / "flat" / names[0]]
    with pytest.raises(DataError, match=r"holds no image .* in folders below it too"):
        plan([tmp_path / "out"], tmp_path, suffixes=(), recursive=True)


def test_probabilities_are_written_as_16_bits_of_the_same_interpolation_as_the_mask(tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (16, 16)).astype(np.uint8)
    picture = np.dstack([values, values * 0, values * 0])
    save(tmp_path / "a.png", picture)
    predict(red, [tmp_path / "a.png"], tmp_path / "out", probabilities=True)
    mode, stored = read_png(tmp_path / "out" / "a_probability.png")
    assert (mode, stored.dtype) == ("I;16", np.uint16)
    np.testing.assert_array_equal(stored, values.astype(np.uint16) * 257)  # 65535 / 255
    _, mask = read_png(tmp_path / "out" / "a_segmentation.png")
    np.testing.assert_array_equal(mask > 0, stored > 32767)

    large = probabilities_at_size(values.astype(np.float32) / 255, 2500, 40)  # three bands
    expected = bilinear(values.astype(np.float64) / 255, 2500, 40) * 65535
    assert abs(large - expected).max() < 2


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    save(tmp_path / "a.png", left_half(8, 8))
    real = os.scandir

    def scandir(path):
        if Path(path).name == "below":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"below cannot be read: Permission denied"):
        plan([tmp_path], tmp_path / "out", suffixes=(), recursive=True)


@pytest.mark.parametrize("length", [NAME_MAX - 4, NAME_MAX - len("_segmentation.png")])
def test_a_name_too_long_for_its_mask_is_that_pictures_line(tmp_path, length):
    long = save(tmp_path / "in" / ("n" * length + ".png"), left_half(8, 8))
    other = save(tmp_path / "in" / "z.png", left_half(8, 8))
    report = predict(red, [long, other], tmp_path / "out", overlay=True)
    written = [tmp_path / "out" / "z_segmentation.png"]
    if length == NAME_MAX - 4:
        [(path, reason)] = report.failed
        assert path == long
        assert str(long) in reason
        assert "File name too long" in reason
    else:  # just short enough, and so is the temporary's name
        assert not report.failed
        written.insert(0, tmp_path / "out" / ("n" * length + "_segmentation.png"))
    assert report.written == written
    assert all(path.exists() for path in written)


def test_a_picture_whose_results_cannot_be_written_is_reported_and_a_full_disk_ends_it(
    tmp_path,
):
    pictures = [save(tmp_path / f"{name}.png", left_half(8, 8)) for name in "abc"]
    (tmp_path / "out" / "b_segmentation.png").mkdir(parents=True)
    report = predict(red, pictures, tmp_path / "out")
    assert [path.name for path, _ in report.failed] == ["b.png"]
    assert re.search(r"b\.png.*cannot be written.*Is a directory", report.failed[0][1])
    assert [path.name[0] for path in report.written] == ["a", "c"]

    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("os.fsync", side_effect=full), pytest.raises(OSError, match="No space"):
        predict(red, pictures, tmp_path / "full")


def test_a_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("words")
    with pytest.raises(DataError, match="holds no image"):
        predict(red, [tmp_path], tmp_path / "out")


def test_clean_removes_the_smaller_spot_of_the_written_mask(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[2:10, 2:10] = 255
    picture[13:15, 13:15] = 255
    source = save(tmp_path / "a.png", picture)
    masks = []
    for clean in (False, True):
        report = predict(red, [source], tmp_path / "out", clean=clean)
        masks.append(read_png(report.written[0])[1])
    assert [int((mask > 0).sum()) for mask in masks] == [64 + 4, 64]


def test_zip_holds_the_masks_given_and_is_the_same_whenever_they_were_written(tmp_path):
    sources = [save(tmp_path / f"{name}.png", left_half(8, 8)) for name in "ba"]
    out = tmp_path / "out"
    masks = predict(red, sources, out, overlay=True).written
    save(out / "stale_segmentation.png", left_half(8, 8))
    zips = []
    for year in (1970, 2020):  # before 1980 there is no date that a zip could say
        for mask in masks:
            os.utime(mask, ((year - 1970) * 365 * 86400 + 86400,) * 2)
        zip_masks(masks, out / "submission.zip")
        zips.append((out / "submission.zip").read_bytes())
    assert zips[0] == zips[1]
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert archive.namelist() == ["a_segmentation.png", "b_segmentation.png"]
        assert archive.read("a_segmentation.png") == (out / "a_segmentation.png").read_bytes()
    with pytest.raises(DataError, match="no mask"):
        zip_masks([], tmp_path / "x.zip")


def test_progress_reaches_the_number_of_inputs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxunet.bars.on_terminal", lambda: True)
    good = save(tmp_path / "a.png", left_half(8, 8))
    bad = tmp_path / "b.txt"
    bad.write_text("words")
    predict(red, [good, bad], tmp_path / "out", progress=True)
    assert "2/2" in capsys.readouterr().err
