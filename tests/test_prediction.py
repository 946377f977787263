"""`jaxunet.prediction` with a fake model: a pixel's probability is its red value / 255."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxunet.errors import DataError
from jaxunet.prediction import (
    clean_up,
    find_images,
    mask_at_size,
    predict_files,
    predict_image,
    zip_masks,
)

SETTINGS = {"image_size": 16, "threshold": 0.5, "batch_size": 4}


def red(images):
    return images[..., :1].astype(np.float32) / 255


def left_half(height, width, colour=(255, 0, 0)):
    """A picture whose left half is `colour`, the rest black."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = colour
    return image


def left_half_mask(height, width):
    return np.where(np.arange(width) < width // 2, 255, 0)[None].repeat(height, axis=0)


def save(path, array, **options):
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
    report = predict_files(red, [source], tmp_path / "out", **SETTINGS)
    assert report.written == [tmp_path / "out" / "a_segmentation.png"]
    mode, mask = read_png(report.written[0])
    assert mode == "L"
    np.testing.assert_array_equal(mask, left_half_mask(40, 60))


def test_mask_of_an_exif_rotated_photo_fits_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: its left half is shown at the top
    source = save(tmp_path / "photo.jpg", left_half(20, 60), exif=exif, quality=95)
    report = predict_files(red, [source], tmp_path / "out", overlay=True, **SETTINGS)
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

    report = predict_files(counting, [tmp_path], tmp_path / "out", **SETTINGS)
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
    report = predict_files(red, inputs, tmp_path / "out", **SETTINGS)
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
        predict_files(never, [tmp_path], tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_picture_named_twice_is_done_once(tmp_path):
    source = save(tmp_path / "a.png", left_half(8, 8))
    assert find_images([source, tmp_path, tmp_path / ".." / tmp_path.name / "a.png"]) == (
        [source],
        [],
    )


def test_a_result_never_replaces_an_input(tmp_path):
    picture = save(tmp_path / "a.png", left_half(8, 8))
    victim = save(tmp_path / "a_segmentation.png", left_half(8, 8))
    before = victim.read_bytes()
    with pytest.raises(DataError, match=r"a_segmentation\.png"):
        predict_files(red, [picture, victim], tmp_path, **SETTINGS)
    assert victim.read_bytes() == before


def test_results_in_the_same_folder_are_not_taken_for_pictures_the_next_time(tmp_path):
    save(tmp_path / "a.png", left_half(8, 8))
    predict_files(red, [tmp_path], tmp_path, overlay=True, **SETTINGS)
    report = predict_files(red, [tmp_path], tmp_path, overlay=True, **SETTINGS)
    names = ["a.png", "a_overlay.png", "a_segmentation.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert sorted(p.name for p in report.passed_over) == names[1:]


def test_hidden_files_and_superpixels_of_a_folder_are_passed_over(tmp_path):
    names = ["._a.jpg", "a.JPG", "a_superpixels.png", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    images, passed_over = find_images([tmp_path])
    assert [p.name for p in images] == ["a.JPG"]
    assert [p.name for p in passed_over] == ["._a.jpg", "a_superpixels.png"]
    assert find_images([tmp_path / "a_superpixels.png"])[0]  # a file is taken as it is


def test_a_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("words")
    with pytest.raises(DataError, match="holds no image"):
        predict_files(red, [tmp_path], tmp_path / "out", **SETTINGS)


def test_an_out_that_is_a_file_is_an_error(tmp_path):
    source = save(tmp_path / "a.png", left_half(8, 8))
    with pytest.raises(DataError, match=r"a\.png is not a folder"):
        predict_files(red, [source], source, **SETTINGS)


def test_clean_removes_the_smaller_spot_of_the_written_mask(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[2:10, 2:10] = 255
    picture[13:15, 13:15] = 255
    source = save(tmp_path / "a.png", picture)
    masks = []
    for clean in (False, True):
        report = predict_files(red, [source], tmp_path / "out", clean=clean, **SETTINGS)
        masks.append(read_png(report.written[0])[1])
    assert [int((mask > 0).sum()) for mask in masks] == [64 + 4, 64]


def test_zip_holds_the_masks_and_nothing_else(tmp_path):
    source = save(tmp_path / "a.png", left_half(8, 8))
    out = tmp_path / "out"
    predict_files(red, [source], out, overlay=True, **SETTINGS)
    zip_masks(out, out / "submission.zip")
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert archive.namelist() == ["a_segmentation.png"]
        assert archive.read("a_segmentation.png") == (out / "a_segmentation.png").read_bytes()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        zip_masks(tmp_path / "empty", tmp_path / "x.zip")


def test_progress_reaches_the_number_of_inputs(tmp_path, capsys):
    good = save(tmp_path / "a.png", left_half(8, 8))
    bad = tmp_path / "b.txt"
    bad.write_text("words")
    predict_files(red, [good, bad], tmp_path / "out", progress=True, **SETTINGS)
    assert "2/2" in capsys.readouterr().err
