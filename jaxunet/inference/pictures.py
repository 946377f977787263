"""Which pictures of files and folders are predicted, and where their masks go."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxunet.data.listing import image_suffixes
from jaxunet.errors import DataError

MASK_SUFFIX, OVERLAY_SUFFIX, PROBABILITY_SUFFIX = "_segmentation", "_overlay", "_probability"
NO_INPUTS = (MASK_SUFFIX, OVERLAY_SUFFIX, PROBABILITY_SUFFIX, "_Segmentation", "_superpixels")
"""Ends of names that are no pictures: what prediction writes, and ISIC 2017's superpixels."""


@dataclass(frozen=True)
class Picture:
    """A picture to predict, and the folder for its mask."""

    source: Path
    folder: Path

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
    that of an image, sorted by name. A file that is named twice is taken once.

    Args:
        suffixes: of the kinds of results that will be written.
        recursive: take the folders below each folder too. A picture's mask then lies under
            `out` as the picture does under the folder that was given.

    Raises:
        DataError: a folder holds no image or can't be read, two pictures would be written to
            one file, or a result would replace an input.
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
    unique: dict[Path, Picture] = {}
    for picture in found.pictures:
        unique.setdefault(picture.source.resolve(), picture)
    pictures = list(unique.values())
    _check_results(pictures, suffixes)
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
