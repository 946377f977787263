"""Scores at native size and submissions, as the ISIC 2018 challenge takes and makes them.

The challenge scores masks at each image's own size, with lesion where above 128
(isic-challenge-scoring 5.6.0), and means each score over images.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxunet.bars import Bar
from jaxunet.config import DataConfig
from jaxunet.data import isic2018
from jaxunet.data.check import decode_mask, sizes_differ
from jaxunet.data.images import decoded, read_image
from jaxunet.data.locate import locate
from jaxunet.data.sources import Pair
from jaxunet.errors import DataError
from jaxunet.inference.prediction import ProbabilitiesFn, predict_each, write_mask
from jaxunet.learning.metrics import Counts
from jaxunet.runs.evaluation import describe

LESION_ABOVE = 128


def originals(config: DataConfig, split: str) -> tuple[list[Pair], dict[str, Any]]:
    """The source files of a split, sorted by id, and what describes them in a report.

    Its fingerprint is the one that a dataset prepared from these files has.

    Raises:
        DataError: the files are not there, or images and masks don't pair up.
    """
    if config.dir is None or config.name == "synthetic":
        raise DataError(
            f"Scoring at native size needs the source files of {config.name!r}: give "
            "--data.dir the folder of an isic2018 or folder dataset."
        )
    source, fingerprint = locate(config)
    for remark in source.remarks:
        print(remark, file=sys.stderr)
    if source.problems:
        raise DataError("\n".join(source.problems))
    if split not in source.splits:
        raise DataError(
            f"{config.dir} holds no split {split!r}, but {', '.join(source.splits)}."
        )
    dataset = describe(
        name=config.name,
        split=split,
        count=len(source.splits[split]),
        image_size="native",
        fingerprint=fingerprint,
        counts={name: len(pairs) for name, pairs in source.splits.items()},
        official_counts=isic2018.OFFICIAL_COUNTS if config.name == "isic2018" else {},
    )
    return source.splits[split], dataset


def read_truth(path: Path | str, contents: bytes | None = None) -> Bool[np.ndarray, "h w"]:
    """A mask as the challenge's scorer reads it: single-channel, lesion where above 128.

    Raises:
        DataError: it is no readable single-channel image.
    """
    with decoded(Path(path) if contents is None else contents, str(path)) as (image, label, _):
        if image.mode not in ("1", "L"):
            raise DataError(f"{label} has mode {image.mode}, but must be greyscale.")
        return np.asarray(image.convert("L")) > LESION_ABOVE


def count(
    prediction: Bool[np.ndarray, "height width"], truth: Bool[np.ndarray, "height width"]
) -> Int[np.ndarray, " 4"]:
    """True and false positives, false and true negatives: as `metrics.confusion_counts`."""
    both = np.bincount((2 * truth + prediction).ravel(), minlength=4)
    return both[[3, 1, 2, 0]]


def evaluate_native(
    probabilities_fn: ProbabilitiesFn,
    pairs: Sequence[Pair],
    out: Path,
    *,
    image_size: int,
    threshold: float,
    batch_size: int,
    progress: bool = True,
) -> Counts:
    """Predict every pair at its own size, write its mask into `out`, and count its pixels.

    True masks are read as `prepare` reads them. The mask of a pair is called after its id, by
    `write_mask`; whatever else `out` holds stays there.

    Returns:
        [pairs, 4] in the order of `pairs`; see `jaxunet.learning.metrics`.

    Raises:
        DataError: a file is damaged, or an image and its mask differ in size.
    """

    def read(pair: Pair) -> np.ndarray:
        return read_image(
            pair.image.read(), name=str(pair.image), max_megapixels=pair.max_megapixels
        )

    def finish(pair: Pair, mask: np.ndarray) -> np.ndarray:
        truth = decode_mask(pair)[:, :, 0]
        size, mask_size = (mask.shape[0], mask.shape[1]), (truth.shape[0], truth.shape[1])
        if problem := sizes_differ(pair, pair.image.read, size, mask_size):
            raise DataError(problem)
        write_mask(out, pair.id, mask)
        return count(mask > LESION_ABOVE, truth > LESION_ABOVE)

    results = predict_each(
        probabilities_fn,
        pairs,
        read,
        finish,
        image_size=image_size,
        threshold=threshold,
        batch_size=batch_size,
    )
    counts = []
    for _, result in Bar("native", len(pairs), results, leave=True, show=progress):
        if isinstance(result, DataError):
            raise result
        counts.append(result)
    return np.stack(counts)


def score_folders(truth: Path, predictions: Path) -> tuple[list[str], Counts]:
    """Ids and counts of a folder of predicted masks against a folder of true ones.

    Masks are matched by `ISIC_` and seven digits, as the challenge does.

    Raises:
        DataError: a truth has no prediction or several, or sizes differ.
    """
    found: dict[str, list[Path]] = {}
    for path in predictions.iterdir():
        if match := re.search(r"ISIC_\d{7}", path.stem):
            found.setdefault(match.group(), []).append(path)
    ids, counts = [], []
    for path in sorted(truth.glob("*.png")):
        match = re.search(r"ISIC_\d{7}", path.stem)
        candidates = found.get(match.group(), []) if match else []
        if match is None or len(candidates) != 1:
            raise DataError(
                f"{path} has {len(candidates)} matching predictions in {predictions}, not one."
            )
        true, predicted = read_truth(path), read_truth(candidates[0])
        if true.shape != predicted.shape:
            raise DataError(f"{candidates[0]} has another size than {path}.")
        ids.append(match.group())
        counts.append(count(predicted, true))
    if not ids:
        raise DataError(f"{truth} holds no masks (*.png).")
    return ids, np.stack(counts)
