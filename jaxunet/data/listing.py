"""Which files lie in a folder or a zip: images, what is passed over, what is wrong.

Nothing is decoded here.
"""

import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from jaxunet.data.images import ADVICE, FORMATS, SAVE_IT
from jaxunet.errors import DataError

MAX_FILE_BYTES = 2**29
"""Largest image file that is read. Ten megabytes of zip can claim ten gigabytes; the largest
image that `read_image` takes by itself has 768 MB as an uncompressed file with 16 bits a
channel, and half of that with 8."""

UNFINISHED = (".crdownload", ".part", ".partial", ".download", ".opdownload", ".filepart")
"""What browsers and other programs call a download that has not ended."""

_UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    ".avif": "AVIF",
    ".jxl": "JPEG XL",
    ".dcm": "DICOM",
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef"), "a camera's raw file"),
}
"""Extensions of pictures that are not decoded: passing them over would lose data."""

_METHODS = {
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
    zipfile.ZIP_BZIP2,
    zipfile.ZIP_LZMA,
    getattr(zipfile, "ZIP_ZSTANDARD", zipfile.ZIP_STORED),  # from Python 3.14 on
}

_KNOWN = re.compile(
    r"license\.txt|attribution\.txt|thumbs\.db|desktop\.ini|.*_superpixels\.png",
    re.IGNORECASE,
)


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

    def checksum(self) -> int | None:
        """CRC-32 of the contents: of a zip's member as the zip has it; None if unreadable."""
        if self.member is not None:
            return self.member.CRC
        if self.size > MAX_FILE_BYTES:
            return None  # Refused, as is what cannot be read, when the pair is checked.
        try:
            checksum = 0
            with self.path.open("rb") as file:
                while block := file.read(2**20):
                    checksum = zlib.crc32(block, checksum)
            return checksum
        except OSError:
            return None


@dataclass
class Listing:
    """What was found; `notes` are lines for the user that stop nothing."""

    files: list[SourceFile] = field(default_factory=list)
    no_images: list[SourceFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_images(root: Path, *, without: Path | None = None) -> Listing:
    """Image files under the folder, or in the zip, `root`, and what else is there.

    Licence texts, superpixels and hidden files don't count. A picture of a kind that is not
    decoded is a problem, and so are a download that has not ended and a name that is not
    UTF-8 or that leaves the archive.

    Args:
        without: a folder below `root` that is another listing's.

    Raises:
        DataError: `root` is neither a folder nor a zip whose members can be read.
        OSError: a folder cannot be listed.
    """
    listing = Listing()
    found = (
        _walk(root, without, listing.notes)
        if root.is_dir()
        else _members(root, listing.problems)
    )
    for file, parts in found:
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        if _KNOWN.fullmatch(file.name):
            continue
        extension = PurePosixPath(file.name).suffix.lower()
        if any("\ud800" <= character <= "\udfff" for character in file.name):
            # How Python passes on the bytes of a name that cannot be decoded.
            listing.problems.append(f"{str(file)!a} has a name that is not UTF-8. Rename it.")
        elif extension in image_suffixes():
            listing.files.append(file)
        elif extension in _UNREAD:
            kind = _UNREAD[extension]
            advice = ADVICE.get(kind, SAVE_IT)
            listing.problems.append(f"{file} is {kind}, which is not read here. {advice}")
        elif extension in UNFINISHED:
            listing.problems.append(f"{file} is a download that has not ended. Get it again.")
        else:
            listing.no_images.append(file)
    return listing


def count_no_images(files: Iterable[SourceFile]) -> list[str]:
    """One line that counts files that are no images, if there are any."""
    files = list(files)
    if not files:
        return []
    kinds = Counter(PurePosixPath(file.name).suffix.lower() or "no extension" for file in files)
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    which = f"{files[0]}" if len(files) == 1 else f"the first is {files[0]}"
    number = f"{len(files)} file{'s' * (len(files) > 1)}"
    return [f"Passed over, as no images: {number} ({counted}); {which}."]


def _walk(
    root: Path, without: Path | None, notes: list[str]
) -> list[tuple[SourceFile, tuple[str, ...]]]:
    """Every file under a folder, links followed, each folder once."""

    def stop(error: OSError) -> None:
        raise error  # os.walk would pass over the folder in silence.

    found = []
    top = Path(os.path.realpath(root))
    seen = {top}

    def is_new(path: Path) -> bool:
        """False for a folder whose files are listed already, or will be without its link."""
        if path == without:
            return False
        real = Path(os.path.realpath(path))
        inside = path.is_symlink() and (top == real or top in real.parents)
        if inside or real in seen or real in Path(os.path.realpath(path.parent)).parents:
            notes.append(f"{path} leads to {real}, whose files are listed once; passed over.")
            return False
        seen.add(real)
        return True

    for folder, names, files in os.walk(root, onerror=stop, followlinks=True):
        names[:] = [name for name in sorted(names) if is_new(Path(folder, name))]
        for name in sorted(files):
            path = Path(folder, name)
            parts = path.relative_to(root).parts
            status = path.lstat() if path.is_symlink() and not path.exists() else path.stat()
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                found.append((SourceFile(path, status.st_size), parts))
    return found


def _members(path: Path, problems: list[str]) -> list[tuple[SourceFile, tuple[str, ...]]]:
    """Every file in a zip.

    Raises:
        DataError: it is no zip, or is encrypted or compressed in a way that is not read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is neither a folder nor a readable zip: {error}.") from error
    members = [member for member in archive.infolist() if not member.is_dir()]
    # Said once, and not of each of its members.
    encrypted = sum(member.flag_bits & 1 for member in members)
    if encrypted:
        raise DataError(
            f"{path} is encrypted ({encrypted} of its {len(members)} files). Unpack it, and "
            "give the folder instead."
        )
    for method in {member.compress_type for member in members} - _METHODS:
        kind = "Deflate64, as by Windows over 2 GB" if method == 9 else f"method {method}"
        raise DataError(
            f"{path} is compressed in a way that is not read here ({kind}). Unpack it, and "
            "give the folder instead."
        )
    found = []
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or re.match(r"[A-Za-z]:", str(name)):
            problems.append(f"{path}: {member.filename} points outside the archive; refused.")
            continue
        found.append((SourceFile(path, member.file_size, member, archive), name.parts))
    return found


@cache
def image_suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def is_image_name(name: str) -> bool:
    """Whether a file of this name is one that `list_images` lists."""
    return name[:1] != "." and PurePosixPath(name).suffix.lower() in image_suffixes()
