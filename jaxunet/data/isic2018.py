"""ISIC 2018 Task 1, from the official zips, what they unpack to, or a download."""

from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import load_url_infos
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from jaxunet.data.builder import PairsBuilder
from jaxunet.data.sources import Source, find_pairs
from jaxunet.errors import DataError

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


def find(folder: Path) -> Source:
    """The splits of which both archives are in `folder`, zipped or unpacked.

    Raises:
        DataError: no split has both.
    """
    if not folder.is_dir():
        raise DataError(f"data.dir is {folder}, which is not a folder.")
    places = {
        split: (archive(folder, images), archive(folder, masks))
        for split, (images, masks) in NAMES.items()
    }
    return collect(
        {
            split: (images, masks)
            for split, (images, masks) in places.items()
            if images is not None and masks is not None
        },
        folder,
    )


def archive(folder: Path, name: str) -> Path | None:
    """The zip called `name` in `folder`, or else what it unpacks to."""
    for path in (folder / f"{name}.zip", folder / name):
        if path.exists():
            return path
    return None


def collect(places: dict[str, tuple[Path, Path]], folder: object) -> Source:
    """The pairs of each split, given where its images and its masks are."""
    if not places:
        needed = "; or ".join(required_files(split) for split in NAMES)
        raise DataError(f"No split of isic2018 is complete in {folder}. It needs {needed}.")
    source = Source({})
    seen: dict[str, str] = {}
    for split, (images, masks) in places.items():
        source.splits[split], problems = find_pairs(images, masks)
        source.problems += problems
        for pair in source.splits[split]:
            if pair.id in seen:
                source.problems.append(
                    f"{pair.image} has the id of an image in split {seen[pair.id]!r}; "
                    "splits must not share images."
                )
            seen[pair.id] = split
    return source


def download(manager: tfds.download.DownloadManager) -> Source:
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
