"""The files of a dataset, in folders or inside zips, and their pairing by id.

Nothing is decoded here; `check` reads what is found.
"""

import hashlib
import os
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from jaxunet.data.images import FORMATS
from jaxunet.errors import DataError

MAX_FILE_BYTES = 2**29
"""Largest image file that is read. Ten megabytes of zip can claim ten gigabytes; the largest
image that `read_image` takes has 480 MB, uncompressed with 16 bits a channel."""

_PASSED_OVER = re.compile(
    r"license\.txt|attribution\.txt|thumbs\.db|desktop\.ini|.*_superpixels\.png",
    re.IGNORECASE,
)
_MASK_SUFFIX = re.compile(r"_(segmentation|mask)$", re.IGNORECASE)


@dataclass(frozen=True)
class SourceFile:
    """One file, on disk or a member of a zip; the zip stays open and is read in place."""

    path: Path
    size: int
    member: zipfile.ZipInfo | None = field(default=None, compare=False)
    archive: zipfile.ZipFile | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return PurePosixPath(self.member.filename).name if self.member else self.path.name

    def __str__(self) -> str:
        return f"{self.path}: {self.member.filename}" if self.member else str(self.path)

    def read(self) -> bytes:
        """Contents of the file; a zip member's CRC is checked.

        Raises:
            DataError: the file cannot be read or has more than `MAX_FILE_BYTES`, or the
                member is damaged.
        """
        if self.size > MAX_FILE_BYTES:
            raise DataError(f"{self} has {self.size:,} bytes; the limit is {MAX_FILE_BYTES:,}.")
        try:
            if self.archive is None or self.member is None:
                return self.path.read_bytes()
            return self.archive.read(self.member)
        except (
            OSError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,  # encrypted; NotImplementedError, a compression unknown here
        ) as error:
            raise DataError(f"{self} cannot be read: {error}.") from error


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    id: str
    image: SourceFile
    mask: SourceFile


@dataclass
class Source:
    """What a dataset is made from: the pairs of each split, and what is wrong so far."""

    splits: dict[str, list[Pair]]
    problems: list[str] = field(default_factory=list)

    def fingerprint(self, *choices: object) -> str:
        """Eight hex digits that change with the data and with `choices`.

        Names and sizes of all files count; so do the CRCs of zip members and of masks on
        disk, where an edit of an uncompressed mask keeps the size.
        """
        digest = hashlib.sha256(repr(choices).encode())
        for split, pairs in self.splits.items():
            for pair in pairs:
                image, mask = pair.image, pair.mask
                crc = image.member.CRC if image.member else None
                mask_crc = mask.member.CRC if mask.member else _crc(mask)
                line = (split, pair.id, image.name, image.size, crc, mask.size, mask_crc)
                digest.update(repr(line).encode())
        # A problem changes what would be prepared, although it is in no pair.
        digest.update(repr(self.problems).encode() if self.problems else b"")
        return digest.hexdigest()[:8]


def list_images(root: Path) -> tuple[list[SourceFile], list[str]]:
    """Image files under the folder, or in the zip, `root`, and problems with the others.

    Licence texts, superpixels and hidden files are passed over; any other file that is not
    an image is a problem, and so is a name that is not UTF-8 or that leaves the archive.

    Raises:
        DataError: `root` is neither a folder nor a readable zip.
        OSError: a folder cannot be listed.
    """
    found = _list_folder(root) if root.is_dir() else None
    problems: list[str] = []
    if found is None:
        found, problems = _list_zip(root)
    files = []
    for file, parts in found:
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        if _PASSED_OVER.fullmatch(file.name):
            continue
        if any("\ud800" <= character <= "\udfff" for character in file.name):
            # How Python passes on the bytes of a name that cannot be decoded.
            problems.append(f"{str(file)!a} has a name that is not UTF-8. Rename it.")
        elif PurePosixPath(file.name).suffix.lower() in _image_suffixes():
            files.append(file)
        else:
            problems.append(f"{file} is not an image. Move it elsewhere.")
    return files, problems


def find_pairs(images: Path, masks: Path) -> tuple[list[Pair], list[str]]:
    """Pairs of the images and the masks under two folders or zips, sorted by id.

    The id is the image's name without its extension. Its mask has that name too, with
    nothing, `_segmentation` or `_mask` added. Every image without exactly one mask, and
    every mask without exactly one image, is a problem. Letters with accents are the same
    however they are encoded, which differs between macOS and other systems (Unicode NFC).
    """
    image_files, problems = list_images(images)
    mask_files, mask_problems = list_images(masks)
    problems += mask_problems
    if not image_files:
        problems.append(f"{images} holds no images.")

    by_id = _group((_stem(file), file) for file in image_files)
    # An image may itself be called `x_mask`, so the whole name is tried first.
    masks_by_id = _group((_mask_id(file, by_id), file) for file in mask_files)
    pairs = []
    for key in sorted(by_id.keys() | masks_by_id.keys()):
        found, found_masks = by_id.get(key, []), masks_by_id.get(key, [])
        if len(found) > 1:
            problems.append(f"{_listed(found)} are images with the same id {key!r}.")
        if len(found_masks) > 1:
            problems.append(f"{_listed(found_masks)} are masks with the same id {key!r}.")
        if not found_masks:
            problems.append(f"{_listed(found)} has no mask in {masks}.")
        if not found:
            problems.append(f"{_listed(found_masks)} has no image in {images}.")
        # Of duplicates the first is paired, so that its contents are checked as well.
        if found and found_masks:
            pairs.append(Pair(key, found[0], found_masks[0]))
    return pairs, problems


def same_contents(pairs: Iterable[Pair]) -> list[str]:
    """A problem for each image file that is another's copy under a second id.

    Copies would be counted twice, and may be dealt into different splits.
    """
    by_size: dict[int, list[SourceFile]] = {}
    for pair in pairs:
        by_size.setdefault(pair.image.size, []).append(pair.image)
    problems = []
    # Only files of one size need to be read, which of compressed images are few.
    for same_size in (files for files in by_size.values() if len(files) > 1):
        first: dict[str, SourceFile] = {}
        for file in same_size:
            try:
                digest = hashlib.sha256(file.read()).hexdigest()
            except DataError:
                continue  # Reported with its reason when the pair is checked.
            if digest in first:
                problems.append(f"{first[digest]} and {file} are the same image. Keep one.")
            first.setdefault(digest, file)
    return problems


def _list_folder(root: Path) -> list[tuple[SourceFile, tuple[str, ...]]]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would pass over the folder in silence.

    found = []
    for folder, names, files in os.walk(root, onerror=stop, followlinks=True):
        names.sort()
        for name in sorted(files):
            path = Path(folder, name)
            parts = path.relative_to(root).parts
            status = path.lstat() if path.is_symlink() and not path.exists() else path.stat()
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                found.append((SourceFile(path, status.st_size), parts))
    return found


def _list_zip(
    path: Path,
) -> tuple[list[tuple[SourceFile, tuple[str, ...]]], list[str]]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is neither a folder nor a readable zip: {error}.") from error
    found, problems = [], []
    for member in archive.infolist():
        if member.is_dir():
            continue
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or re.match(r"[A-Za-z]:", str(name)):
            problems.append(f"{path}: {member.filename} points outside the archive; refused.")
            continue
        found.append((SourceFile(path, member.file_size, member, archive), name.parts))
    return found, problems


@cache
def _image_suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def _stem(file: SourceFile) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(file.name).stem)


def _mask_id(mask: SourceFile, image_ids: Iterable[str]) -> str:
    stem = _stem(mask)
    return stem if stem in image_ids else _MASK_SUFFIX.sub("", stem)


def _group(items: Iterable[tuple[str, SourceFile]]) -> dict[str, list[SourceFile]]:
    groups: dict[str, list[SourceFile]] = {}
    for key, file in items:
        groups.setdefault(key, []).append(file)
    return groups


def _listed(files: list[SourceFile]) -> str:
    return " and ".join(map(str, files))


def _crc(file: SourceFile) -> int | None:
    try:
        return zlib.crc32(file.read())
    except DataError:
        return None  # Reported with its reason when the pair is checked.
