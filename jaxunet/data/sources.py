"""The pairs of image and mask that a dataset is made from, and what tells it from others.

Nothing is decoded here; `check` reads what is found.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from jaxunet.config import MAX_MEGAPIXELS, DataConfig
from jaxunet.data.listing import Listing, SourceFile, count_no_images, list_images
from jaxunet.errors import DataError
from jaxunet.workers import usable_cores

MASK_SUFFIX = re.compile(r"_(segmentation|mask|lesion|label|gt)$", re.IGNORECASE)
"""What the name of a mask usually adds to the name of its image."""


@dataclass(frozen=True)
class Pair:
    """An image and its mask, and how they are to be read: see `DataConfig`."""

    id: str
    image: SourceFile
    mask: SourceFile
    binarize: bool = False
    ignore_value: int | None = None
    max_megapixels: int = MAX_MEGAPIXELS

    def __str__(self) -> str:
        return str(self.image)


@dataclass
class SourcePairs:
    """What a dataset is made from: the pairs of each split, and what is wrong so far."""

    splits: dict[str, list[Pair]]
    problems: list[str] = field(default_factory=list)
    no_images: list[SourceFile] = field(default_factory=list)
    """Files that lie among the images or the masks and are neither."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user about what else lies there and is not part of it."""

    def add(
        self, split: str, images: Path, masks: Path, mask_suffix: str | None = None
    ) -> None:
        """Add the pairs under two folders or zips (see `find_pairs`) as a split."""
        pairs, listing = find_pairs(images, masks, mask_suffix=mask_suffix)
        self.splits[split] = pairs
        self.problems += listing.problems
        self.no_images += listing.no_images
        self.notes += listing.notes

    def read_as(self, config: DataConfig) -> "SourcePairs":
        """The same source, whose pairs are read as `config` says."""
        names = ("binarize", "ignore_value", "max_megapixels")
        how = {name: getattr(config, name) for name in names}
        splits = {
            split: [replace(pair, **how) for pair in pairs]
            for split, pairs in self.splits.items()
        }
        return replace(self, splits=splits)

    @property
    def remarks(self) -> list[str]:
        """A line for each thing that was passed over."""
        return self.notes + count_no_images(self.no_images)

    def fingerprint(self, *choices: object) -> str:
        """Twelve hex digits that change with the data and with `choices`.

        The contents of every file count (as size and CRC-32), with its split and its id.
        Nothing else that a file system says of a file would do: a copy may keep its time of
        change, and so may an edit in place. Zips hold the CRCs; files are read whole, which
        takes as long as their storage does. What zips unpack to has the zips' fingerprint.
        """
        pairs = [(split, pair) for split, pairs in self.splits.items() for pair in pairs]
        files = [file for _, pair in pairs for file in (pair.image, pair.mask)]
        with ThreadPoolExecutor(min(8, 2 * usable_cores())) as pool:
            checksums = pool.map(SourceFile.checksum, files)
            digest = hashlib.sha256(repr(choices).encode())
            for split, pair in pairs:
                image, mask = next(checksums), next(checksums)
                line = (split, pair.id, pair.image.size, image, pair.mask.size, mask)
                digest.update(repr(line).encode())
        # A problem changes what would be prepared, although it is in no pair.
        digest.update(repr(self.problems).encode() if self.problems else b"")
        return digest.hexdigest()[:12]


def find_pairs(
    images: Path, masks: Path, *, mask_suffix: str | None = None
) -> tuple[list[Pair], Listing]:
    """Pairs of the images and the masks under two folders or zips, sorted by id.

    The id is the image's name without its extension. Its mask has that name too, with
    nothing or one of `MASK_SUFFIX` added; where `mask_suffix` is given, with that, and other
    files among the masks are passed over. If both folders are the same, image and mask lie
    side by side, and masks are the files with a suffix.

    Every image without exactly one mask, and every mask without exactly one image, is a
    problem. Letters with accents are the same however they are encoded, which differs between
    macOS and other systems (Unicode NFC).

    Returns:
        The pairs, and a listing with the problems and with what was passed over.
    """

    def is_mask(file: SourceFile) -> bool:
        return bool(
            MASK_SUFFIX.search(_stem(file)) or (mask_suffix and _ends(file, mask_suffix))
        )

    if images == masks:
        found = list_images(images)
        mask_files = [file for file in found.files if is_mask(file)]
        image_files = [file for file in found.files if not is_mask(file)]
    else:
        found, more = list_images(images, without=masks), list_images(masks)
        image_files, mask_files = found.files, more.files
        found.problems += more.problems
        found.no_images += more.no_images
        found.notes += more.notes
    if mask_suffix:
        others = [file for file in mask_files if not _ends(file, mask_suffix)]
        mask_files = [file for file in mask_files if _ends(file, mask_suffix)]
        if others:
            found.notes.append(
                f"Passed over, as masks without the suffix {mask_suffix}: {len(others)}, such "
                f"as {others[0]}."
            )
    if not image_files:
        found.problems.append(f"{images} holds no images.")

    by_id = _group((_stem(file), file) for file in image_files)
    masks_by_id = _group((_mask_id(file, by_id, mask_suffix), file) for file in mask_files)
    pairs, problems = [], found.problems
    for key in sorted(by_id.keys() | masks_by_id.keys()):
        of_image, of_mask = by_id.get(key, []), masks_by_id.get(key, [])
        if len(of_image) > 1:
            problems.append(f"{_listed(of_image)} are images with the same id {key!r}.")
        if len(of_mask) > 1:
            problems.append(
                f"{_listed(of_mask)} are masks with the same id {key!r}. Keep one, or say by "
                "--data.mask-suffix which is meant."
            )
        if not of_mask:
            problems.append(f"{_listed(of_image)} has no mask in {masks}.")
        if not of_image:
            problems.append(f"{_listed(of_mask)} has no image in {images}.")
        # Of duplicates the first is paired, so that its contents are checked as well.
        if of_image and of_mask:
            pairs.append(Pair(key, of_image[0], of_mask[0]))
    return pairs, found


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


def _stem(file: SourceFile) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(file.name).stem)


def _ends(file: SourceFile, suffix: str) -> bool:
    return _stem(file).endswith(unicodedata.normalize("NFC", suffix))


def _mask_id(mask: SourceFile, image_ids: Iterable[str], suffix: str | None) -> str:
    stem = _stem(mask)
    if suffix:
        return stem.removesuffix(unicodedata.normalize("NFC", suffix))
    # An image may itself be called `x_mask`, so the whole name is tried first.
    return stem if stem in image_ids else MASK_SUFFIX.sub("", stem)


def _group(items: Iterable[tuple[str, SourceFile]]) -> dict[str, list[SourceFile]]:
    groups: dict[str, list[SourceFile]] = {}
    for key, file in items:
        groups.setdefault(key, []).append(file)
    return groups


def _listed(files: list[SourceFile]) -> str:
    return " and ".join(map(str, files))
