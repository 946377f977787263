"""Masks for pictures of any size: resize, ask the model, resize back, threshold.

The model sees a square; the mask has the picture's own size. For a photograph that says
through EXIF how it is to be turned, that is the size of the upright picture, as it is
displayed, not of the pixels as stored.
"""

import errno
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8, UInt16
from PIL import Image

from jaxunet.bars import Bar
from jaxunet.data.images import encode_png, read_image, resize_image
from jaxunet.errors import DataError, RunError
from jaxunet.files import write_atomically
from jaxunet.inference.pictures import MASK_SUFFIX, OVERLAY_SUFFIX, PROBABILITY_SUFFIX, Picture
from jaxunet.learning.clean_up import clean_up
from jaxunet.runs.figures import overlay as draw_overlay

ProbabilitiesFn = Callable[[np.ndarray], np.ndarray]
"""From images, uint8 `[batch, size, size, 3]`, to the probability of lesion for each pixel,
float32 `[batch, size, size, 1]`."""

Item = TypeVar("Item")
Result = TypeVar("Result")

# Each holds one picture at its own size: about 0.5 GB for the largest of ISIC 2018.
_THREADS = 4
# Rows of a mask that are computed at once: bounds the float32 copy of a large picture.
_BAND = 1024


@dataclass(frozen=True)
class PredictionReport:
    """What `predict_files` did."""

    written: list[Path] = field(default_factory=list)
    """Masks, in the order of the inputs; overlays and probabilities lie beside them."""
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Inputs that could not be read or whose mask could not be written, with the reason."""


def predict_image(
    probabilities_fn: ProbabilitiesFn,
    image: UInt8[np.ndarray, "height width 3"],
    *,
    image_size: int,
    threshold: float,
) -> UInt8[np.ndarray, "height width"]:
    """Mask of one picture at its own size: 255 where the probability exceeds `threshold`.

    Raises:
        RunError: a probability is not finite.
    """
    height, width, _ = image.shape
    small = resize_image(image, image_size, image_size)[np.newaxis]
    probabilities = checked(probabilities_fn, small, ["the picture"])
    return mask_at_size(probabilities[0, :, :, 0], height, width, threshold)


def mask_at_size(
    probabilities: Float[np.ndarray, "rows columns"], height: int, width: int, threshold: float
) -> UInt8[np.ndarray, "{height} {width}"]:
    """Resize probabilities bilinearly to `height` x `width`, then threshold them.

    255 where the resized probability exceeds `threshold`, else 0. Works in bands of rows,
    so memory beyond the mask itself does not grow with the height.
    """
    mask = np.empty((height, width), np.uint8)
    for rows, band in _bands(probabilities, height, width):
        np.multiply(band > threshold, 255, out=mask[rows], casting="unsafe")
    return mask


def probabilities_at_size(
    probabilities: Float[np.ndarray, "rows columns"], height: int, width: int
) -> UInt16[np.ndarray, "{height} {width}"]:
    """Resize probabilities as `mask_at_size` does; 65535 stands for 1, 0 for 0."""
    scaled = np.empty((height, width), np.uint16)
    for rows, band in _bands(probabilities, height, width):
        scaled[rows] = np.rint(np.clip(band, 0, 1) * np.float32(65535))
    return scaled


def _bands(
    probabilities: np.ndarray, height: int, width: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the resized probabilities, float32, a band at a time."""
    rows, columns = probabilities.shape
    source = Image.fromarray(np.ascontiguousarray(probabilities, dtype=np.float32))
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        # Pillow interpolates across the edges of the box, so that bands join seamlessly.
        box = (0, top * rows / height, columns, bottom * rows / height)
        band = source.resize((width, bottom - top), Image.Resampling.BILINEAR, box=box)
        yield slice(top, bottom), np.asarray(band)


def predict_files(
    probabilities_fn: ProbabilitiesFn,
    pictures: Sequence[Picture],
    *,
    image_size: int,
    threshold: float,
    batch_size: int,
    overlay: bool = False,
    probabilities: bool = False,
    clean: bool = False,
    read: Callable[[Path], np.ndarray] = read_image,
    progress: bool = False,
) -> PredictionReport:
    """Write `<name>_segmentation.png` for each picture: one channel, 0 or 255, its own size.

    A picture that can't be read, or whose mask can't be written, is reported; the others are
    still done. Earlier masks are replaced.

    Args:
        probabilities_fn: the model.
        pictures: which, and where their masks go (`jaxunet.inference.pictures.plan`).
        image_size: side in pixels of the square that the model sees.
        threshold: probability above which a pixel counts as lesion.
        batch_size: images in a batch.
        overlay: also write `<name>_overlay.png`, the picture with the mask's outline.
        probabilities: also write `<name>_probability.png`, one channel of 16 bits in which
            65535 stands for 1, before `clean`.
        clean: fill holes and keep the largest component (`clean_up`).
        read: a file's picture, uint8 `[height, width, 3]`.
        progress: show a progress bar.

    Raises:
        OSError: the disk is full.
        RunError: a probability is not finite.
    """
    report = PredictionReport()

    def at_size(small: np.ndarray, height: int, width: int, threshold: float) -> Any:
        mask = mask_at_size(small, height, width, threshold)
        map_ = probabilities_at_size(small, height, width) if probabilities else None
        return clean_up(mask) if clean else mask, map_

    def write(picture: Picture, made: tuple[np.ndarray, np.ndarray | None]) -> Path:
        mask, map_ = made
        try:
            path = write_mask(picture.folder, picture.source.stem, mask)
            if map_ is not None:
                write_atomically(picture.result(PROBABILITY_SUFFIX), encode_png(map_))
            if overlay:
                drawn = draw_overlay(read(picture.source), mask)
                write_atomically(picture.result(OVERLAY_SUFFIX), encode_png(drawn))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # nor will the others find any
            what = f"{picture.source}: its results cannot be written to {picture.folder}"
            raise DataError(f"{what}: {error.strerror}.") from error
        return path

    results = predict_each(
        probabilities_fn,
        pictures,
        lambda picture: read(picture.source),
        write,
        image_size=image_size,
        threshold=threshold,
        batch_size=batch_size,
        at_size=at_size,
    )
    for picture, result in Bar("predict", len(pictures), results, leave=True, show=progress):
        if isinstance(result, DataError):
            report.failed.append((picture.source, str(result)))
        else:
            report.written.append(result)
    return report


def predict_each(
    probabilities_fn: ProbabilitiesFn,
    items: Sequence[Item],
    read: Callable[[Item], np.ndarray],
    finish: Callable[[Item, Any], Result],
    *,
    image_size: int,
    threshold: float,
    batch_size: int,
    at_size: Callable[[np.ndarray, int, int, float], Any] = mask_at_size,
) -> Generator[tuple[Item, Result | DataError], None, None]:
    """Predict many pictures, several in flight, in bounded memory.

    Threads read ahead and finish behind while the model computes. The last batch is filled
    up with black images, so that the model is compiled once.

    Args:
        items: called in errors what `str` makes of them.
        read: an item's picture, uint8 `[height, width, 3]`.
        finish: called in a thread with the item and what `at_size` gave for it.
        at_size: called in the same thread with an item's probabilities as the model gave
            them, the picture's height and width, and `threshold`; of itself it makes the
            mask, uint8 `[height, width]` of 0 and 255.

    Yields:
        Each item once, in order, with what `finish` returned; an item whose `read` raised a
        `DataError` comes with that error, as soon as it is met, and one whose `finish` did
        in its turn.

    Raises:
        RunError: a probability is not finite.
    """
    finishing: deque[tuple[Item, Future[Result]]] = deque()

    def shrink(item: Item) -> _Small:
        image = read(item)
        height, width, _ = image.shape
        return _Small(height, width, resize_image(image, image_size, image_size))

    def complete(item: Item, small: _Small, probabilities: np.ndarray) -> Result:
        return finish(item, at_size(probabilities, small.height, small.width, threshold))

    def finished() -> Iterator[tuple[Item, Result | DataError]]:
        while finishing:
            item, future = finishing.popleft()
            try:
                yield item, future.result()
            except DataError as error:
                yield item, error

    with ThreadPoolExecutor(_THREADS) as pool:
        batch: list[tuple[Item, _Small]] = []

        def predict() -> Iterator[tuple[Item, Result | DataError]]:
            stacked = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
            stacked[: len(batch)] = [small.pixels for _, small in batch]
            names = [str(item) for item, _ in batch]
            probabilities = checked(probabilities_fn, stacked, names)[..., 0]
            yield from finished()  # of the batch before, which went on meanwhile
            for (item, small), map_ in zip(batch, probabilities, strict=False):
                finishing.append((item, pool.submit(complete, item, small, map_)))
            batch.clear()

        for item, future in _read_ahead(pool, shrink, items, 2 * batch_size):
            try:
                batch.append((item, future.result()))
            except DataError as error:
                yield item, error
            if len(batch) == batch_size:
                yield from predict()
        if batch:
            yield from predict()
        yield from finished()


def write_mask(out: Path, name: str, mask: UInt8[np.ndarray, "height width"]) -> Path:
    """Write `<name>_segmentation.png` into `out`, atomically."""
    write_atomically(path := out / f"{name}{MASK_SUFFIX}.png", encode_png(mask))
    return path


@dataclass(frozen=True)
class _Small:
    """A picture as the model sees it; its own pixels are let go."""

    height: int
    width: int
    pixels: UInt8[np.ndarray, "size size 3"]


def _read_ahead(
    pool: ThreadPoolExecutor,
    read: Callable[[Item], _Small],
    items: Sequence[Item],
    ahead: int,
) -> Iterator[tuple[Item, "Future[_Small]"]]:
    """Items with their pictures on the way, at most `ahead` of them beyond the one given."""
    pending: deque[tuple[Item, Future[_Small]]] = deque()
    for item in items:
        pending.append((item, pool.submit(read, item)))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


def checked(
    probabilities_fn: ProbabilitiesFn, images: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """What the model gives, checked, as float32; `names` are of the images that count."""
    probabilities = np.asarray(probabilities_fn(images), dtype=np.float32)
    if probabilities.shape != (*images.shape[:3], 1):
        raise ValueError(
            f"probabilities_fn gave the shape {probabilities.shape} for images of shape "
            f"{images.shape}, but must give {(*images.shape[:3], 1)}."
        )
    for name, each in zip(names, probabilities, strict=False):
        if not np.isfinite(each).all():
            raise RunError(
                f"What the model makes of {name} is not finite, and no mask: its weights are, "
                "but too large for their type, or for model.dtype. Take another checkpoint, or "
                "train anew with a smaller optimizer.learning_rate."
            )
    return probabilities
