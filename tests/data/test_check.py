import dataclasses
import os
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import encoded, half_mask, picture, write_files, write_zip

from jaxunet.data.check import LISTED, Decoded, check_pair, report
from jaxunet.data.listing import list_images
from jaxunet.data.sources import SourcePairs, find_pairs
from jaxunet.errors import DataError

IMAGE, MASK = encoded(picture(0)), encoded(half_mask())


def problems_of(folder: Path, *, binarize: bool = False) -> list[str]:
    pairs, listing = find_pairs(folder / "images", folder / "masks")
    problems = listing.problems
    for pair in pairs:
        checked = check_pair(dataclasses.replace(pair, binarize=binarize))
        problems += checked if isinstance(checked, list) else []
    return problems


def make(folder: Path, images: dict[str, bytes], masks: dict[str, bytes]) -> Path:
    write_files(folder / "images", images)
    write_files(folder / "masks", masks)
    return folder


def test_a_sound_pair_is_decoded(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": IMAGE}, {"a.png": MASK})
    [pair], listing = find_pairs(tmp_path / "images", tmp_path / "masks")
    checked = check_pair(pair)
    assert listing.problems == []
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
        ("a.bmp", "a_lesion.bmp"),
        ("a.jpg", "a_label.png"),
        ("a.jpg", "a_GT.png"),
        ("a_mask.png", "a_mask.png"),
    ],
)
def test_a_mask_is_found_by_name(tmp_path: Path, image: str, mask: str) -> None:
    make(tmp_path, {image: IMAGE}, {mask: MASK})
    [pair], listing = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert (pair.id, listing.problems) == (Path(image).stem, [])
    assert (pair.image.name, pair.mask.name) == (image, mask)


def test_files_that_are_no_images_are_passed_over_and_counted(tmp_path: Path) -> None:
    known = ["LICENSE.txt", "ATTRIBUTION.txt", ".DS_Store", "Thumbs.db", "a_superpixels.png"]
    make(tmp_path, {"a.png": IMAGE} | dict.fromkeys(known, b""), {"a.png": MASK})

    def source() -> SourcePairs:
        found = SourcePairs({})
        found.add("train", tmp_path / "images", tmp_path / "masks")
        return found

    assert (source().problems, source().remarks) == ([], [])
    write_files(tmp_path / "images", {"metadata.csv": b"", "README": b""})
    write_files(tmp_path / "masks", {"more.csv": b""})
    assert source().problems == []
    [line] = source().remarks
    assert "3 files (2 .csv, 1 no extension)" in line
    assert str(tmp_path / "images" / "README") in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "b.heic",
            r"b\.heic is HEIC, which is not read here\. Save it as JPEG or PNG; an iPhone",
        ),
        ("b.dcm", r"b\.dcm is DICOM, which is not read here\. Save it as JPEG or PNG\."),
        ("b.jpg.crdownload", r"b\.jpg\.crdownload is a download that has not ended"),
    ],
)
def test_pictures_that_cannot_be_read_are_not_passed_over(
    tmp_path: Path, name: str, said: str
) -> None:
    make(tmp_path, {"a.png": IMAGE, name: b""}, {"a.png": MASK})
    [problem] = problems_of(tmp_path)
    assert re.search(said, problem)


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


@pytest.mark.parametrize(
    ("mask", "said"),
    [((30, 40), "as the mask is"), ((30, 41), "and so is neither")],
)
def test_a_rotated_image_that_does_not_fit_its_mask_is_said_to_be_turned(
    tmp_path: Path, mask: tuple[int, int], said: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make(tmp_path, {}, {"a.png": encoded(half_mask(*mask))})
    Image.fromarray(picture(0)).save(tmp_path / "images" / "a.jpg", exif=exif)
    [problem] = problems_of(tmp_path)
    assert f"is {mask[1]} x {mask[0]} pixels" in problem
    assert "is 30 x 40 once it is turned upright as its EXIF" in problem
    assert f"stored as 40 x 30, {said}" in problem


def test_both_files_of_a_pair_are_reported(tmp_path: Path) -> None:
    grey = np.full((30, 40), 200, np.uint8)
    grey[0, 0] = 100
    make(tmp_path, {"a.png": IMAGE[:200]}, {"a.png": encoded(grey)})
    image, mask = problems_of(tmp_path)
    assert "images/a.png cannot be decoded" in image
    assert "masks/a.png holds the values 100, 200" in mask
    [image] = problems_of(tmp_path, binarize=True)
    assert "images/a.png" in image


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    write_zip(tmp_path / "images.zip", {"a.png": IMAGE, "b.png": IMAGE})
    write_zip(tmp_path / "masks.zip", {"a.png": MASK, "b.png": MASK})
    contents = bytearray((tmp_path / "images.zip").read_bytes())
    contents[contents.index(IMAGE) + len(IMAGE) // 2] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(contents)
    pairs, listing = find_pairs(tmp_path / "images.zip", tmp_path / "masks.zip")
    first, second = (check_pair(pair) for pair in pairs)
    assert listing.problems == []
    assert isinstance(first, list)
    assert "images/a.png cannot be read: Bad CRC-32" in first[0]
    assert isinstance(second, Decoded)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "C:\\a.png"])
def test_zip_members_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "masks.zip", {"a.png": MASK})
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(name, IMAGE)
        archive.writestr("a.png", IMAGE)
    pairs, listing = find_pairs(tmp_path / "images.zip", tmp_path / "masks.zip")
    [problem] = listing.problems
    assert "points outside the archive" in problem
    assert [pair.id for pair in pairs] == ["a"]


def test_a_broken_zip_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"images\.zip is neither a folder nor a readable zip"):
        find_pairs(tmp_path / "images.zip", tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("method", 9, r"Deflate64"), ("method", 98, "method 98"), ("flags", 1, "encrypted")],
)
def test_a_zip_of_which_no_member_can_be_read_is_one_sentence(
    tmp_path: Path, field: str, value: int, said: str
) -> None:
    path = tmp_path / "images.zip"
    write_zip(path, {f"{name}.png": IMAGE for name in "abcdef"})
    contents = bytearray(path.read_bytes())
    at = contents.find(b"PK\x01\x02")
    while at >= 0:  # what the zip's directory says of each member
        offset = {"flags": 8, "method": 10}[field]
        contents[at + offset : at + offset + 2] = struct.pack("<H", value)
        at = contents.find(b"PK\x01\x02", at + 4)
    path.write_bytes(contents)
    with pytest.raises(DataError, match=rf"images\.zip is .*{said}.*Unpack it") as error:
        find_pairs(path, tmp_path)
    assert "\n" not in str(error.value)


def test_links_are_followed_each_file_once_and_circles_are_named(tmp_path: Path) -> None:
    make(tmp_path / "own", {"a.png": IMAGE}, {})
    elsewhere = tmp_path / "elsewhere"
    make(elsewhere, {"b.png": IMAGE}, {"b.png": MASK})
    write_files(tmp_path / "single", {"c.png": IMAGE})
    images = tmp_path / "own" / "images"
    (images / "c.png").symlink_to(tmp_path / "single" / "c.png")
    (images / "more").symlink_to(elsewhere / "images")
    (images / "again").symlink_to(elsewhere / "images")
    for name, target in {"loop": ".", "up": "..", "down": "sub"}.items():
        (images / name).symlink_to(target)
    write_files(images / "sub", {"d.png": IMAGE})
    # A second circle through another folder: with two the walk never ended.
    (elsewhere / "images" / "back").symlink_to(images)
    (elsewhere / "images" / "round").symlink_to(elsewhere)
    listing = list_images(images)
    assert sorted(file.name for file in listing.files) == ["a.png", "b.png", "c.png", "d.png"]
    named = {Path(note.split(" leads to ")[0]).name for note in listing.notes}
    assert named == {"more", "loop", "up", "down", "back", "round"}


def test_fingerprint_follows_names_contents_and_choices(tmp_path: Path) -> None:
    def fingerprint(*choices: object) -> str:
        pairs, _ = find_pairs(tmp_path / "images", tmp_path / "masks")
        return SourcePairs({"train": pairs}).fingerprint(*choices)

    # Uncompressed, so that other pixels have the same size; and the times are kept, as by
    # tools that edit in place.
    image = {"a.bmp": encoded(picture(0), "BMP")}
    make(tmp_path, image, {"a.bmp": encoded(half_mask(), "BMP")})
    found = [fingerprint(), fingerprint(True)]
    assert re.fullmatch(r"[0-9a-f]{12}", found[0])
    assert fingerprint() == found[0]
    for kind, contents in {"masks": 255 - half_mask(), "images": 255 - picture(0)}.items():
        path = tmp_path / kind / "a.bmp"
        before = path.stat()
        path.write_bytes(encoded(contents, "BMP"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        found.append(fingerprint())
    for kind in ("images", "masks"):
        for path in list((tmp_path / kind).iterdir()):
            path.rename(path.with_stem("b"))
    assert len({*found, fingerprint()}) == 5


def test_a_zip_and_what_it_unpacks_to_have_one_fingerprint(tmp_path: Path) -> None:
    zips = tmp_path / "images.zip", tmp_path / "masks.zip"
    for path, contents in zip(zips, (IMAGE, MASK), strict=True):
        write_zip(path, {"a.png": contents})
        zipfile.ZipFile(path).extractall(tmp_path)
    sources = [SourcePairs({}), SourcePairs({})]
    sources[0].add("train", *zips)
    sources[1].add("train", tmp_path / "images", tmp_path / "masks")
    assert sources[0].fingerprint() == sources[1].fingerprint()


def test_a_fault_of_every_file_is_not_told_of_each() -> None:
    same = [f"masks/{number}.png holds the values 0, {number}." for number in range(2594)]
    heading, *lines, last = report("own", [*same, "images/x.png cannot be read."]).splitlines()
    assert heading.startswith("2595 problems found in own")
    assert lines == [*same[:LISTED], "images/x.png cannot be read."]
    assert last == "And 2,544 more of the same kinds."
    assert report("own", same[:3]).splitlines()[1:] == same[:3]
