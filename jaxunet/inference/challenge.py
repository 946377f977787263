"""Scores at native size and submissions, as the ISIC 2018 challenge takes and makes them.

The challenge scores masks at each image's own size, with lesion where above 128
(isic-challenge-scoring 5.6.0), and means each score over images.
"""

import io
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxunet.bars import Bar
from jaxunet.config import IGNORED, DataConfig
from jaxunet.data import isic2018
from jaxunet.data.check import decode_mask, report, sizes_differ
from jaxunet.data.images import read_image
from jaxunet.data.locate import locate
from jaxunet.data.sources import Pair
from jaxunet.errors import DataError
from jaxunet.files import write_atomically
from jaxunet.inference.prediction import ProbabilitiesFn, predict_each, write_mask
from jaxunet.learning.boundary import boundary_scores
from jaxunet.learning.clean_up import clean_up
from jaxunet.learning.metrics import Counts, count
from jaxunet.runs.evaluation import describe

LESION_ABOVE = 128
TOLERANCE = 10.0
"""Pixels that a boundary may be off and still count as found: about 1% of the diagonal of the
smaller pictures of ISIC 2018 (1022 x 767, say), and the width of one or two of the pixels that
a model of 128 px sees of them."""


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
        raise DataError(report(config.dir, source.problems, "nothing was scored"))
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


def evaluate_native(
    probabilities_fn: ProbabilitiesFn,
    pairs: Sequence[Pair],
    out: Path,
    *,
    image_size: int,
    threshold: float,
    batch_size: int,
    tolerance: float = TOLERANCE,
    clean: bool = False,
    progress: bool = True,
) -> tuple[Counts, Float[np.ndarray, "images 2"] | None]:
    """Predict every pair at its own size, write its mask into `out`, and score it.

    True masks are read as `prepare` reads them. The mask of a pair is called after its id, by
    `write_mask`; whatever else `out` holds stays there. Masks come there all together at the
    end: those of a scoring that fails would be taken for its results, or mixed with another's.

    Args:
        tolerance: see `jaxunet.learning.boundary`, in pixels of the picture.
        clean: fill holes and keep the largest component (`clean_up`).

    Returns:
        Counts [pairs, 4] and scores of the boundary [pairs, 2] in the order of `pairs`; see
        `jaxunet.learning.metrics` and `jaxunet.learning.boundary`. The latter are None where
        pixels are ignored: through them an outline runs that nobody knows.

    Raises:
        DataError: a file is damaged, or an image and its mask differ in size.
        RunError: the model's output is not finite.
    """

    def read(pair: Pair) -> np.ndarray:
        return read_image(
            pair.image.read(), name=str(pair.image), max_megapixels=pair.max_megapixels
        )

    def finish(pair: Pair, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        truth = decode_mask(pair)[:, :, 0]
        size, mask_size = (mask.shape[0], mask.shape[1]), (truth.shape[0], truth.shape[1])
        if problem := sizes_differ(pair, pair.image.read, size, mask_size):
            raise DataError(problem)
        mask = clean_up(mask) if clean else mask
        write_mask(Path(unfinished), pair.id, mask)
        found, true = mask > LESION_ABOVE, truth > LESION_ABOVE
        if pair.ignore_value is not None:
            return count(found, true, truth != IGNORED), None
        return count(found, true), boundary_scores(found, true, tolerance)

    scored = []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as unfinished:
        predicted = predict_each(
            probabilities_fn,
            pairs,
            read,
            finish,
            image_size=image_size,
            threshold=threshold,
            batch_size=batch_size,
        )
        with closing(predicted) as results:  # threads may be writing
            for _, result in Bar("native", len(pairs), results, leave=True, show=progress):
                if isinstance(result, DataError):
                    raise result
                scored.append(result)
        for mask in Path(unfinished).iterdir():
            mask.replace(out / mask.name)
    counts, boundaries = zip(*scored, strict=True)
    ignores = any(pair.ignore_value is not None for pair in pairs)
    return np.stack(counts), None if ignores else np.stack(boundaries)


def zip_masks(masks: Sequence[Path], path: Path) -> None:
    """Pack `masks` into a flat zip, as the challenge takes them.

    The same masks give the same zip, bit for bit, whenever they were written.

    Raises:
        DataError: there is no mask.
    """
    if not masks:
        raise DataError(f"There is no mask to pack into {path}.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for mask in sorted(masks):
            # Dated 1980, the first that a zip can say.
            archive.writestr(zipfile.ZipInfo(mask.name), mask.read_bytes())
    write_atomically(path, buffer.getvalue())
