"""ISIC 2018 Task 1, from the official zips, what they unpack to, or a download."""

from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import load_url_infos
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from jaxunet.data.builder import PairsBuilder
from jaxunet.data.listing import UNFINISHED
from jaxunet.data.sources import SourcePairs
from jaxunet.errors import DataError, SourceGone

URL = "https://isic-challenge-data.s3.amazonaws.com/2018/"
NAMES = {
    split: (f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth")
    for split, part in
    {"train": "Training", "validation": "Validation", "test": "Test"}.items()
}  # fmt: skip
"""Per split, what the archives of images and of masks are called."""
OFFICIAL_COUNTS = {"train": 2594, "validation": 100, "test": 1000}


class Isic2018(PairsBuilder):
    """Skin-lesion segmentation, ISIC 2018 challenge, Task 1."""

    url_infos = load_url_infos(Path(__file__).with_name("checksums.tsv"))
    DESCRIPTION = (
        "Dermoscopy images with lesion masks: ISIC 2018, Skin Lesion Analysis Towards "
        "Melanoma Detection, Task 1 (lesion boundary segmentation)."
    )
    HOMEPAGE = "https://challenge.isic-archive.com/landing/2018/"
    LICENCE = "CC BY-NC 4.0"


def required_files(split: str) -> str:
    images, masks = NAMES[split]
    return f"{images} and {masks}, each as a folder or a .zip"


def find(folder: Path) -> SourcePairs:
    """The splits of which both archives are in `folder`, zipped or unpacked.

    Raises:
        SourceGone: the folder is not there, or holds nothing of the challenge.
        DataError: no split has both archives.
    """
    if not folder.is_dir():
        raise SourceGone(f"data.dir is {folder}, which is not a folder.")
    places, halves = {}, []
    for split, names in NAMES.items():
        images, masks = (archive(folder, name) for name in names)
        if images is not None and masks is not None:
            places[split] = (images, masks)
        elif half := _half(folder, split, images or masks):
            halves.append(half)
    if not places and not halves:
        raise SourceGone(_none_complete(folder))
    source = collect(places, folder, halves)
    source.notes += halves
    return source


def archive(folder: Path, name: str) -> Path | None:
    """The zip called `name` in `folder`, or else what it unpacks to."""
    for path in (folder / f"{name}.zip", folder / name):
        if path.exists():
            return path
    return None


def _half(folder: Path, split: str, whole: Path | None) -> str | None:
    """A line about a split of which only a part is there, or None if nothing of it is."""
    parts = [] if whole is None else [f"{whole.name} without its counterpart"]
    for name in NAMES[split]:
        for path in sorted(folder.glob(f"{name}?*")):
            if path != whole and path.suffix.lower() in UNFINISHED:
                parts.append(f"{path.name}, a download that has not ended")
            elif path != whole:
                parts.append(f"{path.name}, which must be called {name}.zip")
    if not parts:
        return None
    return (
        f"The split {split} is left out, for {folder} holds {' and '.join(parts)}. It needs "
        f"{required_files(split)}."
    )


def _none_complete(folder: object) -> str:
    needed = "; or ".join(required_files(split) for split in NAMES)
    return f"No split of isic2018 is complete in {folder}. It needs {needed}."


def collect(
    places: dict[str, tuple[Path, Path]], folder: object, halves: Sequence[str] = ()
) -> SourcePairs:
    """The pairs of each split, given where its images and its masks are.

    Raises:
        DataError: no split is given; `halves` says what else was found.
    """
    if not places:
        raise DataError("\n".join([_none_complete(folder), *halves]))
    source = SourcePairs({})
    seen: dict[str, str] = {}
    for split, (images, masks) in places.items():
        source.add(split, images, masks)
        for pair in source.splits[split]:
            if pair.id in seen:
                source.problems.append(
                    f"{pair.image} has the id of an image in split {seen[pair.id]!r}; "
                    "splits must not share images."
                )
            seen[pair.id] = split
    return source


def download(manager: tfds.download.DownloadManager) -> SourcePairs:
    """Fetch the official zips, verified by size and SHA-256 (`checksums.tsv`)."""
    urls = {
        f"{split}-{part}": f"{URL}{name}.zip"
        for split, names in NAMES.items()
        for part, name in enumerate(names)
    }
    try:
        paths = manager.download(urls)
    except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
        raise DataError(
            f"The download from {URL} failed: {error}\nGet the zips by hand, and pass the "
            "folder that holds them as --data.dir."
        ) from error
    return collect(
        {split: (Path(paths[f"{split}-0"]), Path(paths[f"{split}-1"])) for split in NAMES},
        "the download",
    )
