"""A user's own data: `images/` and `masks/`, alone or under one folder per split."""

from pathlib import Path

import numpy as np

from jaxunet.data.builder import PairsBuilder
from jaxunet.data.sources import Pair, Source, find_pairs
from jaxunet.errors import DataError

SPLITS = ("train", "validation", "test")


class Folder(PairsBuilder):
    """Images and masks from a folder."""

    DESCRIPTION = "Images with masks from a folder of the user's."


def required_files(split: str) -> str:
    return f"{split}/images and {split}/masks in data.dir, or images and masks to be split"


def find(folder: Path, seed: int) -> Source:
    """The pairs of `folder`, by its split subfolders or else by a seeded split.

    Raises:
        DataError: the folder has neither layout, or both.
    """
    if not folder.is_dir():
        raise DataError(f"data.dir is {folder}, which is not a folder.")
    given = [split for split in SPLITS if (folder / split).is_dir()]
    whole = [name for name in ("images", "masks") if (folder / name).is_dir()]
    if given and whole:
        raise DataError(
            f"{folder} holds both {' and '.join(whole)} and the split folders "
            f"{', '.join(given)}. Keep one of the two layouts."
        )
    if not given:
        pairs, problems = _find_pairs(folder)
        if 0 < len(pairs) < 3:
            problems.append(
                f"{folder} holds {len(pairs)} pairs, too few for a split into train, "
                "validation and test. Give train/ and validation/ folders instead."
            )
            return Source({"train": pairs}, problems)
        return Source(seeded_split(pairs, seed), problems)
    source = Source({})
    for split in given:
        source.splits[split], problems = _find_pairs(folder / split)
        source.problems += problems
    return source


def seeded_split(pairs: list[Pair], seed: int) -> dict[str, list[Pair]]:
    """Deal pairs out 80/10/10, at least one each, every split in order of ids."""
    held_out = max(1, round(len(pairs) / 10))
    order = np.random.default_rng(seed).permutation(len(pairs))
    bounds = {
        "validation": order[:held_out],
        "test": order[held_out : 2 * held_out],
        "train": order[2 * held_out :],
    }
    return {split: [pairs[i] for i in sorted(bounds[split])] for split in SPLITS}


def _find_pairs(folder: Path) -> tuple[list[Pair], list[str]]:
    missing = [name for name in ("images", "masks") if not (folder / name).is_dir()]
    if missing:
        raise DataError(
            f"{folder} has no folder {' and no folder '.join(missing)}. It must hold images/ "
            "and masks/, or train/, validation/ and test/ that do."
        )
    return find_pairs(folder / "images", folder / "masks")
