"""A user's own data: images and masks, in sub-folders or side by side, split or to be split."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from jaxunet.config import DataConfig
from jaxunet.data.builder import PairsBuilder
from jaxunet.data.listing import is_image_name
from jaxunet.data.sources import MASK_SUFFIX, Pair, SourcePairs
from jaxunet.errors import DataError, SourceGone

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label", "gt", "groundtruth", "annotations", "annotation")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""What folders are called; capitals, blanks, hyphens and underscores don't count."""

BOUNDS = {"train": (0.1, 0.9), "validation": (0.0, 0.1), "test": (0.9, 1.0)}
"""Where in [0, 1) the hash of an id lies that belongs to a split. The held-out splits are at
the ends, so that one that has to borrow its only pair borrows neither's from the other."""


class Folder(PairsBuilder):
    """Images and masks from a folder."""

    DESCRIPTION = "Images with masks from a folder of the user's."


def required_files(split: str) -> str:
    return f"{split}/images and {split}/masks in data.dir, or images and masks to be split"


def find(folder: Path, config: DataConfig) -> SourcePairs:
    """The pairs of `folder`, by its split sub-folders or else split by `config`.

    Raises:
        SourceGone: the folder is not there, or is empty.
        DataError: the folder has none of the layouts, or could be read in two ways.
    """
    if not folder.is_dir():
        raise SourceGone(f"data.dir is {folder}, which is not a folder.")
    if not any(folder.iterdir()):
        raise SourceGone(f"data.dir is {folder}, which is empty.")
    folders = _folders(folder)
    given = {
        split: path
        for split, names in SPLITS.items()
        if (path := _one_of(folders, names, f"the split {split}", "Keep one of them."))
    }
    whole = [path.name for path in _subfolders(folder, config) if path not in (None, folder)]
    whole = whole or list(_side_by_side(_files(folder), config.mask_suffix) or ())
    if given and whole:
        raise DataError(
            f"{folder} holds both {' and '.join(whole)} and the split folders "
            f"{', '.join(path.name for path in given.values())}. Keep one of the two layouts."
        )
    source = SourcePairs({})
    for split, path in given.items():
        source.add(split, *_places(path, config), config.mask_suffix)
    used = list(given.values())
    if not given:
        images, masks = _places(folder, config)
        used += [images, masks]
        source.add("train", images, masks, config.mask_suffix)
        pairs = source.splits["train"]
        if 0 < len(pairs) < 3:
            source.problems.append(
                f"{folder} holds {len(pairs)} pairs, too few for a split into train, "
                "validation and test. Give train/ and validation/ folders instead."
            )
        elif pairs:
            deal = hashed_split if config.folder_split == "hash" else permuted_split
            source.splits = deal(pairs, config.folder_split_seed)
    if folder not in used:  # else every file below it was looked at
        source.notes += _beside(folder, used)
    return source


def _beside(folder: Path, used: Sequence[Path]) -> list[str]:
    """What lies in the folder beside the sub-folders that are used, and looks like data."""
    notes = [
        f"Passed over: {path} holds images and masks too, but is called like no split (train, "
        "validation, test). Rename it, or give it as --data.dir."
        for path in _folders(folder)
        if path not in used and _holds_pairs(path)
    ]
    images = [name for name in _files(folder) if is_image_name(name)]
    if images:
        number = f"{len(images)} image{'s' * (len(images) > 1)}"
        notes.append(f"Passed over: {number} directly in {folder}, such as {images[0]}.")
    return notes


def hashed_split(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Deal pairs out by a hash of their ids, about 80/10/10, at least one each.

    A pair that comes or goes moves no other. Only a split that would be empty borrows the
    pair that is nearest to its bounds, and gives it back once it has one of its own.

    Args:
        pairs: at least three.
    """

    def place(pair: Pair) -> float:
        digest = hashlib.sha256(f"{seed}:{pair.id}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    splits = {
        split: [pair for pair in pairs if low <= place(pair) < high]
        for split, (low, high) in BOUNDS.items()
    }
    for split, bounds in BOUNDS.items():
        if not splits[split]:
            spare = [pair for other in splits.values() if len(other) > 1 for pair in other]
            nearest = min(spare, key=lambda pair: min(abs(place(pair) - b) for b in bounds))
            for other in splits.values():
                if nearest in other:
                    other.remove(nearest)
            splits[split] = [nearest]
    return splits


def permuted_split(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Deal pairs out 80/10/10 by a permutation of their number, as earlier versions did.

    A pair that comes or goes deals all others anew.
    """
    held_out = max(1, round(len(pairs) / 10))
    order = np.random.default_rng(seed).permutation(len(pairs))
    bounds = {
        "train": order[2 * held_out :],
        "validation": order[:held_out],
        "test": order[held_out : 2 * held_out],
    }
    return {split: [pairs[i] for i in sorted(bounds[split])] for split in SPLITS}


def _places(folder: Path, config: DataConfig) -> tuple[Path, Path]:
    """Where the images and where the masks of one split are; the same if side by side.

    Raises:
        DataError: they are not in `folder`, or there are two readings of it.
    """
    images, masks = _subfolders(folder, config)
    mixed = _side_by_side(_files(folder), config.mask_suffix)
    if mixed and (images or masks) and not (config.images and config.masks):
        raise DataError(
            f"{folder} can be read in two ways: {mixed[0]} and {mixed[1]} lie side by side in "
            f"it, and it has the folder {' and '.join(p.name for p in (images, masks) if p)}. "
            "Move one of them away, or name both places by --data.images and --data.masks (a "
            "dot is the folder itself)."
        )
    if images and masks:
        return images, masks
    others = [path for path in _folders(folder) if _holds_pairs(path, side_by_side=False)]
    below = (path.name for path in folder.rglob("*"))
    named = config.images or config.masks
    if not named and (mixed or (not others and _side_by_side(below, config.mask_suffix))):
        return folder, folder
    missing = [
        f"no folder {option or kind}"
        for path, option, kind in (
            (images, config.images, "images"),
            (masks, config.masks, "masks"),
        )
        if path is None
    ]
    found = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder} has {' and '.join(missing)}. It must hold images/ and masks/, or train/, "
        "validation/ and test/ that do, or each mask beside its image as NAME_mask; "
        "--data.images, --data.masks (a dot is the folder itself) and --data.mask-suffix take "
        f"other names. Found: {', '.join(found[:6])}{', ...' * (len(found) > 6)}."
        + "".join(f" Give {path} as --data.dir to take what it holds." for path in others)
    )


def _subfolders(folder: Path, config: DataConfig) -> tuple[Path | None, Path | None]:
    """The sub-folders of images and of masks, as named by options or else as usual."""

    def find(option: str | None, names: Sequence[str], what: str) -> Path | None:
        if option is None:
            advice = f"Say which by --data.{what}."
            return _one_of(_folders(folder), names, f"the folder of {what}", advice)
        return folder / option if (folder / option).is_dir() else None

    return find(config.images, IMAGES, "images"), find(config.masks, MASKS, "masks")


def _one_of(
    folders: Sequence[Path], names: Sequence[str], what: str, advice: str
) -> Path | None:
    """The folder that has one of the names.

    Raises:
        DataError: several have.
    """
    found = [path for path in folders if re.sub("[-_ ]", "", path.name.lower()) in names]
    if len(found) > 1:
        raise DataError(f"{' and '.join(map(str, found))} may each be {what}. {advice}")
    return found[0] if found else None


def _side_by_side(names: Iterable[str], mask_suffix: str | None) -> tuple[str, str] | None:
    """Of these names of files, those of an image and its mask, if there are such."""
    by_stem = {PurePosixPath(name).stem: name for name in names if is_image_name(name)}
    for stem, name in by_stem.items():
        own = stem.removesuffix(mask_suffix) if mask_suffix else MASK_SUFFIX.sub("", stem)
        if own != stem and own in by_stem:
            return by_stem[own], name
    return None


def _holds_pairs(folder: Path, *, side_by_side: bool = True) -> bool:
    """Whether a folder looks like a split, whatever it is called."""
    called = {re.sub("[-_ ]", "", path.name.lower()) for path in _folders(folder)}
    if called & set(IMAGES) and called & set(MASKS):
        return True
    return side_by_side and _side_by_side(_files(folder), None) is not None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())
