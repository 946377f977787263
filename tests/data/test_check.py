import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import encoded, half_mask, picture, write_files, write_zip

from jaxunet.data.check import Decoded, check_pair
from jaxunet.data.sources import Source, find_pairs
from jaxunet.errors import DataError

IMAGE, MASK = encoded(picture(0)), encoded(half_mask())


def problems_of(folder: Path, *, binarize: bool = False) -> list[str]:
    pairs, problems = find_pairs(folder / "images", folder / "masks")
    for pair in pairs:
        checked = check_pair(pair, binarize=binarize)
        problems += checked if isinstance(checked, list) else []
    return problems


def make(folder: Path, images: dict[str, bytes], masks: dict[str, bytes]) -> Path:
    write_files(folder / "images", images)
    write_files(folder / "masks", masks)
    return folder


def test_a_sound_pair_is_decoded(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": IMAGE}, {"a.png": MASK})
    [pair], problems = find_pairs(tmp_path / "images", tmp_path / "masks")
    checked = check_pair(pair)
    assert problems == []
    assert isinstance(checked, Decoded)
    assert checked.image_file == IMAGE
    assert np.array_equal(checked.image, picture(0))
    assert np.array_equal(checked.mask[:, :, 0], half_mask())


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.png", "a.png"),
        ("a.JPG", "a_segmentation.png"),
        ("a.jpeg", "a_Segmentation.png"),
        ("a.bmp", "a_mask.tif"),
        ("a_mask.png", "a_mask.png"),
    ],
)
def test_a_mask_is_found_by_name(tmp_path: Path, image: str, mask: str) -> None:
    make(tmp_path, {image: IMAGE}, {mask: MASK})
    [pair], problems = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert (pair.id, problems) == (Path(image).stem, [])
    assert (pair.image.name, pair.mask.name) == (image, mask)


def test_known_and_hidden_files_are_passed_over_and_others_reported(tmp_path: Path) -> None:
    known = ["LICENSE.txt", "ATTRIBUTION.txt", ".DS_Store", "Thumbs.db", "a_superpixels.png"]
    make(tmp_path, {"a.png": IMAGE} | dict.fromkeys(known, b""), {"a.png": MASK})
    assert problems_of(tmp_path) == []
    write_files(tmp_path / "masks", {"a.csv": b""})
    [problem] = problems_of(tmp_path)
    assert f"{tmp_path / 'masks' / 'a.csv'} is not an image" in problem


def test_images_and_masks_without_partner_are_named(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": IMAGE, "b.png": IMAGE}, {"a.png": MASK, "c.png": MASK})
    without_mask, without_image = problems_of(tmp_path)
    assert f"{tmp_path / 'images' / 'b.png'} has no mask" in without_mask
    assert f"{tmp_path / 'masks' / 'c.png'} has no image" in without_image


def test_duplicates_are_named(tmp_path: Path) -> None:
    make(
        tmp_path,
        {"a.png": IMAGE, "a.jpg": IMAGE},
        {"a.png": MASK, "a_segmentation.png": MASK},
    )
    images, masks = problems_of(tmp_path)
    assert "a.jpg and" in images
    assert "images with the same id 'a'" in images
    assert "masks with the same id 'a'" in masks


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    make(tmp_path, {}, {})
    assert problems_of(tmp_path) == [f"{tmp_path / 'images'} holds no images."]


def test_sizes_that_differ_are_named(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": IMAGE}, {"a.png": encoded(half_mask(30, 41))})
    [problem] = problems_of(tmp_path)
    assert "is 41 x 30 pixels" in problem
    assert "is 40 x 30" in problem


def test_a_rotated_image_does_not_fit_its_upright_mask(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make(tmp_path, {}, {"a.png": MASK})
    Image.fromarray(picture(0)).save(tmp_path / "images" / "a.jpg", exif=exif)
    [problem] = problems_of(tmp_path)
    assert "40 x 30 pixels" in problem
    assert "is 30 x 40" in problem


def test_both_files_of_a_pair_are_reported(tmp_path: Path) -> None:
    grey = np.full((30, 40), 200, np.uint8)
    make(tmp_path, {"a.png": IMAGE[:200]}, {"a.png": encoded(grey)})
    image, mask = problems_of(tmp_path)
    assert "images/a.png cannot be decoded" in image
    assert "masks/a.png holds the values 200" in mask
    [image] = problems_of(tmp_path, binarize=True)
    assert "images/a.png" in image


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    write_zip(tmp_path / "images.zip", {"a.png": IMAGE, "b.png": IMAGE})
    write_zip(tmp_path / "masks.zip", {"a.png": MASK, "b.png": MASK})
    contents = bytearray((tmp_path / "images.zip").read_bytes())
    contents[contents.index(IMAGE) + len(IMAGE) // 2] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(contents)
    pairs, problems = find_pairs(tmp_path / "images.zip", tmp_path / "masks.zip")
    first, second = (check_pair(pair) for pair in pairs)
    assert problems == []
    assert isinstance(first, list)
    assert "images/a.png cannot be read: Bad CRC-32" in first[0]
    assert isinstance(second, Decoded)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "C:\\a.png"])
def test_zip_members_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "masks.zip", {"a.png": MASK})
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(name, IMAGE)
        archive.writestr("a.png", IMAGE)
    pairs, [problem] = find_pairs(tmp_path / "images.zip", tmp_path / "masks.zip")
    assert "points outside the archive" in problem
    assert [pair.id for pair in pairs] == ["a"]


def test_a_broken_zip_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"images\.zip is neither a folder nor a readable zip"):
        find_pairs(tmp_path / "images.zip", tmp_path)


def test_fingerprint_follows_names_contents_and_choices(tmp_path: Path) -> None:
    def fingerprint(*choices: object) -> str:
        pairs, _ = find_pairs(tmp_path / "images", tmp_path / "masks")
        return Source({"train": pairs}).fingerprint(*choices)

    # Uncompressed, so that another mask has the same size.
    make(tmp_path, {"a.png": IMAGE}, {"a.bmp": encoded(half_mask(), "BMP")})
    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(True) != first
    write_files(tmp_path / "masks", {"a.bmp": encoded(255 - half_mask(), "BMP")})
    second = fingerprint()
    assert second != first
    for kind in ("images", "masks"):
        for path in list((tmp_path / kind).iterdir()):
            path.rename(path.with_stem("b"))
    assert fingerprint() not in (first, second)
