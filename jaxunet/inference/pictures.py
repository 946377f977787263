"""Which pictures of files and folders are predicted, and where their masks go."""

import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxunet.data.listing import image_suffixes
from jaxunet.errors import DataError
from jaxunet.files import check_writable

MASK_SUFFIX, OVERLAY_SUFFIX, PROBABILITY_SUFFIX = "_segmentation", "_overlay", "_probability"
NO_INPUTS = (MASK_SUFFIX, OVERLAY_SUFFIX, PROBABILITY_SUFFIX, "_Segmentation", "_superpixels")
"""Ends of names that are no pictures: what prediction writes, and ISIC 2017's superpixels."""


@dataclass(frozen=True)
class Picture:
    """A picture to predict, and the folder for its mask."""

    source: Path
    folder: Path

    def __str__(self) -> str:
        return str(self.source)

    def result(self, suffix: str) -> Path:
        """The file for this picture's result of the kind `suffix`."""
        return self.folder / f"{self.source.stem}{suffix}.png"


@dataclass(frozen=True)
class Plan:
    """What is predicted, and what of the folders is not."""

    pictures: list[Picture]
    results: list[Path]
    """Masks, overlays and probabilities of before, superpixels and hidden files."""
    others: list[Path]
    """Files that are named like no kind of image read here."""


def plan(
    inputs: list[Path], out: Path, *, suffixes: tuple[str, ...], recursive: bool = False
) -> Plan:
    """Resolve files and folders into pictures, with a folder under `out` for each mask.

    A file is taken as it is, whatever its name; of a folder, the files whose extension is
    that of an image, sorted by name. A file that is named twice is taken once; links to it
    that have other names are pictures of their own.

    Args:
        suffixes: of the kinds of results that will be written.
        recursive: take the folders below each folder too. A picture's mask then lies under
            `out` as the picture does under the folder that was given.

    Raises:
        DataError: a folder holds no image or can't be read, two pictures would be written to
            one file, or a result would replace an input.
        RunError: two results' names differ in case or in Unicode's form alone, and `out`,
            in which that is tried out, can't be written to.
    """
    found = Plan([], [], [])
    for entry in inputs:
        if not entry.is_dir():
            found.pictures.append(Picture(entry, out))
            continue
        before = len(found.pictures)
        for path in _files(entry, recursive):
            if path.name.startswith(".") or path.stem.endswith(NO_INPUTS):
                found.results.append(path)
            elif path.suffix.lower() not in image_suffixes():
                found.others.append(path)
            else:
                found.pictures.append(Picture(path, out / path.parent.relative_to(entry)))
        if len(found.pictures) == before:
            raise DataError(
                f"{entry} holds no image to predict (masks, overlays and hidden files do not "
                f"count); looked for {' '.join(sorted(image_suffixes()))}"
                + (", in folders below it too." if recursive else ", not in folders below it.")
            )
    pictures = list(_once(found.pictures))
    _check_results(pictures, suffixes)
    _check_names(pictures, out)
    return Plan(pictures, found.results, found.others)


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    """Files of a folder by name, then those of the folders below it; each folder once."""

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error

    seen: set[Path] = set()
    for top, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        # Not pipes and the like, which may never end; links that lead nowhere are reported.
        paths = [Path(top, name) for name in sorted(files)]
        yield from (path for path in paths if path.is_file() or not path.exists())
        seen.add(Path(top).resolve())
        below = [name for name in sorted(folders) if not name.startswith(".")]
        # A link may lead back to where the walk has been.
        folders[:] = [n for n in below if recursive and Path(top, n).resolve() not in seen]


def _once(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Each file once, and of links to one file those that lead to different masks."""
    seen: set[object] = set()
    for picture in pictures:
        source = picture.source
        file = source.parent.resolve() / source.name
        mask = (source.resolve(), picture.result(MASK_SUFFIX))
        if file not in seen and mask not in seen:
            yield picture
        seen |= {file, mask}


def _check_names(pictures: list[Picture], out: Path) -> None:
    """Refuse masks whose names are one and the same to the file system of `out`.

    Some ignore case, or whether an accent is a character of its own, and some don't.
    """
    alike: dict[str, list[Picture]] = {}
    for picture in pictures:
        mask = str(picture.result(MASK_SUFFIX).relative_to(out))
        alike.setdefault(unicodedata.normalize("NFC", mask.casefold()), []).append(picture)
    for group in alike.values():
        masks = [picture.result(MASK_SUFFIX).relative_to(out) for picture in group]
        if len(group) > 1 and not _are_files_of_their_own(masks, out):
            raise DataError(
                f"{' and '.join(map(str, group))} would be written to the same file, as names "
                f"that differ in case or in the form of their accents alone are the same in "
                f"{out}. Rename them, or use an output folder for each."
            )


def _are_files_of_their_own(names: list[Path], out: Path) -> bool:
    check_writable(out)
    with tempfile.TemporaryDirectory(prefix=".jaxunet-", dir=out) as trial:
        try:
            for name in names:
                path = Path(trial) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def _check_results(pictures: list[Picture], suffixes: tuple[str, ...]) -> None:
    """Refuse results that would replace each other or an input."""
    by_mask: dict[Path, list[Path]] = {}
    for picture in pictures:
        by_mask.setdefault(picture.result(MASK_SUFFIX), []).append(picture.source)
    for mask, sources in by_mask.items():
        if len(sources) > 1:
            raise DataError(
                f"{' and '.join(map(str, sources))} would all be written to {mask}. Rename "
                "them, or use an output folder for each."
            )
    results = {each.result(suffix).resolve() for each in pictures for suffix in suffixes}
    for picture in pictures:
        if picture.source.resolve() in results:
            raise DataError(
                f"{picture.source} is an input and would be replaced. Don't write to "
                f"{picture.folder}."
            )
