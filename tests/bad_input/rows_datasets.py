"""Rows of the table: folders, zips and prepared datasets."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np
from ground import SIDE, World, sound_picture
from rows import Refused, Row, Taken, prepared_as
from small_data import encoded, half_mask, isic_files, picture, served, write_zip

from jaxunet.data.isic2018 import Isic2018

IMAGE = picture(0, SIDE, SIDE)
MASK = half_mask(SIDE, SIDE)
TRAIN_IMAGES = "isic/ISIC2018_Task1-2_Training_Input.zip"
TRAIN_MASKS = "isic/ISIC2018_Task1_Training_GroundTruth.zip"
VALIDATION_MASKS = "isic/ISIC2018_Task1_Validation_GroundTruth.zip"


def own(name: str, breaks: Callable[[World], object], outcome: Refused | Taken) -> Row:
    """Something is wrong in own/ when it is prepared."""

    def command(world: World) -> list[object]:
        breaks(world)
        return world.prepare_command("folder")

    return Row(name, command, outcome)


def isic(name: str, breaks: Callable[[World], object], outcome: Refused | Taken) -> Row:
    """Something is wrong in the challenge's zips when they are prepared."""

    def command(world: World) -> list[object]:
        breaks(world)
        return world.prepare_command("isic2018")

    return Row(name, command, outcome)


def trained_on(name: str, breaks: Callable[[World], object], outcome: Refused | Taken) -> Row:
    """Something is wrong in the prepared dataset of own/ when a run is started on it."""

    def command(world: World) -> list[object]:
        breaks(world)
        _, *words = world.prepare_command("folder")
        small = ["--model.width", 2, "--model.depth", 2, "--optimizer.warmup-steps", 0]
        return ["train.py", "--data.name", *words, *small, "--out", world.path / "new"]

    return Row(name, command, outcome)


def add(world: World, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    world.file(f"own/train/images/{name}.png", encoded(image))
    world.file(f"own/train/masks/{name}.png", encoded(mask))


def printed(message: str) -> Taken:
    """The script does its work, and says this."""

    def check(world: World, output: str) -> None:
        assert re.search(message, output.replace(f"{world.path}/", "")), output

    return Taken(check)


# Root may read everything, so that a refusal has to be played to be tested everywhere.


def denied_file(name: str) -> Callable[[World], AbstractContextManager[object]]:
    @contextlib.contextmanager
    def deny(world: World) -> Iterator[None]:
        read = Path.read_bytes

        def refuse(path: Path) -> bytes:
            if path == world.path / name:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        with mock.patch.object(Path, "read_bytes", refuse):
            yield

    return deny


def denied_folder(name: str) -> Callable[[World], AbstractContextManager[object]]:
    @contextlib.contextmanager
    def deny(world: World) -> Iterator[None]:
        scan = os.scandir

        def refuse(path: str = ".") -> object:
            if Path(path) == world.path / name:
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        with mock.patch.object(os, "scandir", refuse):
            yield

    return deny


def rename(world: World, old: str, new: str) -> None:
    (world.path / old).rename(world.path / new)


def name_of_bytes(world: World) -> None:
    latin = os.fsdecode("Läsion.png".encode("latin-1"))
    rename(world, "own/train/images/b.png", f"own/train/images/{latin}")


def differently_encoded(world: World) -> None:
    """An image named on a Mac, its mask elsewhere."""
    for kind, form in {"images": "NFD", "masks": "NFC"}.items():
        name = unicodedata.normalize(form, "läsion") + ".png"
        rename(world, f"own/train/{kind}/b.png", f"own/train/{kind}/{name}")


def link_to_nothing(world: World, name: str) -> None:
    world.file(name, None).symlink_to("gone.png")


def unicode_and_spaces(world: World) -> None:
    for kind in ("images", "masks"):
        rename(world, f"own/train/{kind}/b.png", f"own/train/{kind}/病変 №1 (copy).png")


def damaged_member(world: World) -> None:
    world.forget_prepared()
    images, _ = isic_files([7])
    middle = images["ISIC_0000007.jpg"][-40:-10]
    world.edit(TRAIN_IMAGES, lambda zipped: zipped.replace(middle, bytes(30)))


def hostile_names(world: World) -> None:
    with zipfile.ZipFile(world.path / TRAIN_IMAGES, "a") as archive:
        for name in ("../../evil.jpg", "/etc/evil.jpg", r"C:\evil.jpg"):
            archive.writestr(name, b"evil")


def encrypted(world: World) -> None:
    """Every member marked as encrypted, in its header and in the directory."""
    world.forget_prepared()
    contents = bytearray((world.path / VALIDATION_MASKS).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = contents.find(signature)
        while at >= 0:
            contents[at + flags] |= 1
            at = contents.find(signature, at + 4)
    world.file(VALIDATION_MASKS, bytes(contents))


def deflate64(world: World) -> None:
    """Every member said to be compressed as Windows compresses large zips."""
    contents = bytearray((world.path / TRAIN_IMAGES).read_bytes())
    at = contents.find(b"PK\x01\x02")
    while at >= 0:
        contents[at + 10] = 9
        at = contents.find(b"PK\x01\x02", at + 4)
    world.file(TRAIN_IMAGES, bytes(contents))


def zip_bomb(world: World) -> None:
    with zipfile.ZipFile(world.path / TRAIN_IMAGES, "a") as archive:
        archive.writestr("ISIC_0000099.jpg", b"")
        archive.infolist()[-1].file_size = 2**33
    with zipfile.ZipFile(world.path / TRAIN_MASKS, "a") as archive:
        archive.writestr("ISIC_0000099_segmentation.png", encoded(MASK))


def shared_id(world: World) -> None:
    images, masks = isic_files([3, 20])
    write_zip(world.path / "isic/ISIC2018_Task1-2_Validation_Input.zip", images)
    write_zip(world.path / VALIDATION_MASKS, masks)


def wrong_checksum(world: World) -> list[object]:
    images, masks = isic_files([30])
    write_zip(world.path / "isic/ISIC2018_Task1-2_Test_Input.zip", images)
    write_zip(world.path / "isic/ISIC2018_Task1_Test_GroundTruth.zip", masks)
    words = world.prepare_command("isic2018")
    at = words.index("--data.dir")
    return words[:at] + words[at + 2 :]


@contextlib.contextmanager
def another_checksum(world: World) -> Iterator[None]:
    with served(world.path / "isic"):
        infos = Isic2018.url_infos or {}
        [url] = [url for url in infos if url.endswith(Path(VALIDATION_MASKS).name)]
        infos[url] = dataclasses.replace(infos[url], checksum="0" * 64)
        yield


PREPARED = "prepared/folder/16-*/1.1.0"
DAMAGED = r"prepared/folder/16-\w+/1\.1\.0 is damaged"
AGAIN = r"Delete it, and it will be prepared again\."


def prepared_file(name: str) -> Callable[[World], str]:
    return lambda world: world.glob(f"{PREPARED}/{name}")


SHARD, INFO = prepared_file("*train*record*"), prepared_file("dataset_info.json")


def other_version(world: World) -> None:
    info = json.loads((world.path / INFO(world)).read_text())
    world.file(INFO(world), json.dumps({**info, "version": "0.9.0"}))


def older_beside(world: World) -> None:
    directory = world.path / world.glob(PREPARED)
    shutil.move(directory, directory.with_name("0.9.0"))


def older_is_kept(world: World, output: str) -> None:
    assert world.glob("prepared/folder/16-*/0.9.0")
    assert world.glob("prepared/folder/16-*/1.1.0")


ROWS = [
    # Which file belongs to which.
    own(
        "missing mask",
        lambda world: world.file("own/train/masks/b.png", None),
        Refused(r"own/train/images/b\.png has no mask in own/train/masks"),
    ),
    own(
        "missing image",
        lambda world: world.file("own/train/images/b.png", None),
        Refused(r"own/train/masks/b\.png has no image in own/train/images"),
    ),
    own(
        "two masks for one image",
        lambda world: world.file("own/train/masks/b_mask.png", encoded(MASK)),
        Refused(r"masks/b\.png and .*masks/b_mask\.png are masks with the same id 'b'"),
    ),
    own(
        "duplicate ids",
        lambda world: world.file("own/train/images/b.bmp", encoded(IMAGE, "BMP")),
        Refused(r"images/b\.bmp and .*images/b\.png are images with the same id 'b'"),
    ),
    own(
        "one image under two ids, in two splits",
        lambda world: add(world, "copy", sound_picture("y"), MASK),
        Refused(r"train/images/copy\.png and .*y\.png are the same image\. Keep one\."),
    ),
    own("names in Unicode, with spaces", unicode_and_spaces, prepared_as("病変 №1 (copy)")),
    own("names of different Unicode forms", differently_encoded, prepared_as("läsion")),
    own(
        "name that is not UTF-8",
        name_of_bytes,
        Refused(r"L\\udce4sion\.png' has a name that is not UTF-8\. Rename it\."),
    ),
    own(
        "link to nothing",
        lambda world: link_to_nothing(world, "own/train/images/b.png"),
        Refused(r"own/train/images/b\.png cannot be read: .*No such file"),
    ),
    own(
        "stray files",
        lambda world: [
            world.file("own/train/masks/notes.xlsx", b""),
            world.file("own/validation/images/README", b""),
        ],
        printed(r"Passed over, as no images: 2 files \(1 \.xlsx, 1 no extension\); .*xlsx"),
    ),
    own(
        "picture that a telephone took",
        lambda world: rename(world, "own/train/images/b.png", "own/train/images/b.HEIC"),
        Refused(
            r"2 problems .*images/b\.HEIC is HEIC, which is not read here\. Save it as JPEG"
        ),
    ),
    own(
        "link into its own folder",
        lambda world: (world.path / "own/train/images/again").symlink_to("."),
        printed(r"own/train/images/again leads to .*, whose files are listed once"),
    ),
    # Folders.
    own(
        "two folders of masks",
        lambda world: world.file("own/train/labels/a.png", encoded(MASK)),
        Refused(r"labels and .*masks may each be the folder of masks\. Say which by --data"),
    ),
    own(
        "folder called like no split",
        lambda world: shutil.copytree(world.path / "own/train", world.path / "own/holdout"),
        printed("Passed over: .*own/holdout holds images and masks too"),
    ),
    own(
        "empty folder",
        lambda world: [path.unlink() for path in world.path.glob("own/train/*/*")],
        Refused("own/train/images holds no images"),
    ),
    own(
        "no folder of masks",
        lambda world: shutil.rmtree(world.path / "own/train/masks"),
        Refused("own/train has no folder masks. It must hold images/ and masks/, or"),
    ),
    own(
        "both layouts",
        lambda world: world.file("own/images/a.png", encoded(IMAGE)),
        Refused("own holds both images and the split folders train, validation. Keep one"),
    ),
    own(
        "no such folder",
        lambda world: shutil.rmtree(world.path / "own"),
        Refused(r"data\.dir is own, which is not a folder"),
    ),
    Row(
        "file without read permission",
        lambda world: world.forget_prepared() or world.prepare_command("folder"),
        Refused(r"own/train/images/b\.png cannot be read: .*Permission denied"),
        denied_file("own/train/images/b.png"),
    ),
    Row(
        "folder without read permission",
        lambda world: world.prepare_command("folder"),
        Refused("own/train/masks cannot be read: Permission denied"),
        denied_folder("own/train/masks"),
    ),
    # Zips.
    isic(
        "zip with a damaged member",
        damaged_member,
        Refused(r"1 problem found in isic; .*Input\.zip: .*ISIC_0000007\.jpg .*Bad CRC-32"),
    ),
    isic(
        "zip with names that leave it",
        hostile_names,
        Refused(
            r"3 problems .*: \.\./\.\./evil\.jpg points outside the archive; refused\. .*: "
            r"/etc/evil\.jpg points .*: C:\\evil\.jpg points"
        ),
    ),
    isic(
        "truncated zip",
        lambda world: world.edit(TRAIN_IMAGES, lambda zipped: zipped[: len(zipped) // 2]),
        Refused(rf"{TRAIN_IMAGES} is neither a folder nor a readable zip: .*not a zip"),
    ),
    isic(
        "text named .zip",
        lambda world: world.file(VALIDATION_MASKS, "<html>Not found</html>"),
        Refused(rf"{VALIDATION_MASKS} is neither a folder nor a readable zip"),
    ),
    isic(
        "encrypted zip",
        encrypted,
        Refused(rf"{VALIDATION_MASKS} is encrypted \(2 of its 2 files\)\. Unpack it"),
    ),
    isic(
        "zip member of 8 GiB",
        zip_bomb,
        Refused(r"ISIC_0000099\.jpg has 8,589,934,592 bytes; the limit is 536,870,912"),
    ),
    isic(
        "zip compressed by Deflate64",
        deflate64,
        Refused(rf"{TRAIN_IMAGES} is compressed in a way .*Deflate64.*Unpack it, and give"),
    ),
    isic(
        "half of a split",
        lambda world: rename(world, TRAIN_IMAGES, f"{TRAIN_IMAGES}.crdownload"),
        printed(
            r"The split train is left out, .*Input\.zip\.crdownload, a download that has not"
        ),
    ),
    isic("id in two splits", shared_id, Refused("ISIC_0000003.jpg has the id of an image in")),
    isic(
        "no split complete",
        lambda world: [path.unlink() for path in world.path.glob("isic/*GroundTruth.zip")],
        Refused("No split of isic2018 is complete in isic. It needs ISIC2018_Task1-2_Training"),
    ),
    Row(
        "wrong SHA-256",
        wrong_checksum,
        Refused(
            r"Validation_GroundTruth\.zip, .*has wrong checksum.* --data\.dir",
            leaves="prepared",
        ),
        another_checksum,
    ),
    # Prepared datasets.
    trained_on(
        "ArrayRecord cut short",
        lambda world: world.edit(SHARD(world), lambda shard: shard[:-100]),
        Refused(rf"{DAMAGED} \(262,044 bytes of 262,144\)\. {AGAIN}"),
    ),
    trained_on(
        "ArrayRecord with a damaged record",
        lambda world: world.edit(SHARD(world), lambda shard: shard.replace(b"IDAT", b"IDOT")),
        Refused(
            rf"{DAMAGED}, or .*: Corrupted .*hash mismatch.* {AGAIN}",
            leaves="new",
        ),
    ),
    trained_on(
        "ArrayRecord gone",
        lambda world: world.file(SHARD(world), None),
        Refused(rf"{DAMAGED} \(131,072 bytes of 262,144\)\. {AGAIN}"),
    ),
    own(
        "prepared by another version of the format",
        other_version,
        Refused(rf"{DAMAGED}, or was prepared by another version: .*0\.9\.0.* {AGAIN}"),
    ),
    own("prepared by an older version, lying beside", older_beside, Taken(older_is_kept)),
    own(
        "dataset_info.json garbled",
        lambda world: world.file(INFO(world), "{"),
        Refused(rf"{DAMAGED}, or .*JSON.* {AGAIN}"),
    ),
    own(
        "features.json garbled",
        lambda world: world.file(prepared_file("features.json")(world), "[1]"),
        Refused(rf"{DAMAGED}, or .* {AGAIN}"),
    ),
    own(
        "features.json that names a module",
        lambda world: world.edit(
            prepared_file("features.json")(world),
            lambda text: text.replace(
                b"tensorflow_datasets.core.features.text_", b"evil.text_"
            ),
        ),
        Refused(rf"{DAMAGED}, or .*features\.json names 'evil\.text_feature\.Text'.* {AGAIN}"),
    ),
    own(
        "list of ids shortened",
        lambda world: world.file(prepared_file("split_ids.json")(world), '{"train": ["a"]}'),
        Refused(rf"{DAMAGED}, or .*split_ids\.json does not hold .* {AGAIN}"),
    ),
    Row(
        "--data.prepared-dir is a file",
        lambda world: [
            *("prepare_data.py", "--data.image-size", SIDE),
            *("--data.prepared-dir", world.path / "weights.pth"),
        ],
        Refused(r"weights\.pth.* cannot be written: .*(Not a directory|File exists)"),
    ),
]
