"""Masks for pictures of any size: resize, ask the model, resize back, threshold.

The model sees a square; the mask has the picture's own size. For a photograph that says
through EXIF how it is to be turned, that is the size of the upright picture, as it is
displayed, not of the pixels as stored.
"""

import io
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.ndimage
from jaxtyping import Float, UInt8
from PIL import Image

from jaxunet.bars import Bar
from jaxunet.data.images import encode_png, read_image, resize_image
from jaxunet.errors import DataError
from jaxunet.figures import overlay as draw_overlay
from jaxunet.files import write_atomically

ProbabilitiesFn = Callable[[np.ndarray], np.ndarray]
"""From images, uint8 `[batch, size, size, 3]`, to the probability of lesion for each pixel,
float32 `[batch, size, size, 1]`."""

Item = TypeVar("Item")
Result = TypeVar("Result")

MASK_SUFFIX, OVERLAY_SUFFIX = "_segmentation", "_overlay"
NO_INPUTS = (MASK_SUFFIX, OVERLAY_SUFFIX, "_Segmentation", "_superpixels")
IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Each holds one picture at its own size: about 0.5 GB for the largest of ISIC 2018.
_THREADS = 4
# Rows of a mask that are computed at once: bounds the float32 copy of a large picture.
_BAND = 1024


@dataclass(frozen=True)
class PredictionReport:
    """What `predict_files` did."""

    written: list[Path] = field(default_factory=list)
    """Masks, in the order of the inputs; overlays lie beside them."""
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Inputs that could not be read, each with the reason."""
    passed_over: list[Path] = field(default_factory=list)
    """Files in folders that are named like masks or overlays, and so not predicted."""


def predict_image(
    probabilities_fn: ProbabilitiesFn,
    image: UInt8[np.ndarray, "height width 3"],
    *,
    image_size: int,
    threshold: float,
) -> UInt8[np.ndarray, "height width"]:
    """Mask of one picture at its own size: 255 where the probability exceeds `threshold`."""
    height, width, _ = image.shape
    small = resize_image(image, image_size, image_size)[np.newaxis]
    probabilities = _probabilities(probabilities_fn, small)
    return mask_at_size(probabilities[0, :, :, 0], height, width, threshold)


def mask_at_size(
    probabilities: Float[np.ndarray, "rows columns"], height: int, width: int, threshold: float
) -> UInt8[np.ndarray, "{height} {width}"]:
    """Resize probabilities bilinearly to `height` x `width`, then threshold them.

    255 where the resized probability exceeds `threshold`, else 0. Works in bands of rows,
    so memory beyond the mask itself does not grow with the height.
    """
    rows, columns = probabilities.shape
    source = Image.fromarray(np.ascontiguousarray(probabilities, dtype=np.float32))
    mask = np.empty((height, width), np.uint8)
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        # Pillow interpolates across the edges of the box, so that bands join seamlessly.
        box = (0, top * rows / height, columns, bottom * rows / height)
        band = source.resize((width, bottom - top), Image.Resampling.BILINEAR, box=box)
        np.multiply(np.asarray(band) > threshold, 255, out=mask[top:bottom], casting="unsafe")
    return mask


def clean_up(mask: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Fill the holes of a 0/255 mask, then keep only its largest component.

    Pixels that touch at a corner belong together. Of components of equal size the first in
    reading order stays. An empty mask stays empty.
    """
    filled = scipy.ndimage.binary_fill_holes(mask)
    labels, count = scipy.ndimage.label(filled, structure=np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(labels.ravel())
        filled = labels == 1 + np.argmax(sizes[1:])
    return np.where(filled, 255, 0).astype(np.uint8)


def find_images(inputs: list[Path]) -> tuple[list[Path], list[Path]]:
    """Resolve files and folders into images to predict.

    A file is taken as it is, whatever its name; of a folder, the files whose extension is
    that of an image, sorted by name. A file that is named twice is taken once.

    Returns:
        The images, and the files that were passed over because they are named like what
        prediction writes (`_segmentation`, `_overlay`), ISIC 2017's `_superpixels`, or
        hidden.

    Raises:
        DataError: a folder holds no image.
    """
    images: list[Path] = []
    passed_over: list[Path] = []
    for entry in inputs:
        if not entry.is_dir():
            images.append(entry)
            continue
        found = [p for p in sorted(entry.iterdir()) if p.suffix.lower() in IMAGE_EXTENSIONS]
        taken = [p for p in found if not p.stem.endswith(NO_INPUTS) and p.name[0] != "."]
        if not taken:
            raise DataError(
                f"{entry} holds no image to predict (masks, overlays and hidden files do not "
                f"count); looked for {' '.join(IMAGE_EXTENSIONS)}, not in folders below it."
            )
        images += taken
        passed_over += sorted(set(found) - set(taken))
    unique: dict[Path, Path] = {}
    for path in images:
        unique.setdefault(path.resolve(), path)
    return list(unique.values()), passed_over


def predict_files(
    probabilities_fn: ProbabilitiesFn,
    inputs: list[Path],
    out: Path,
    *,
    image_size: int,
    threshold: float,
    batch_size: int,
    overlay: bool = False,
    clean: bool = False,
    progress: bool = False,
) -> PredictionReport:
    """Write `<name>_segmentation.png` for each picture: one channel, 0 or 255, its own size.

    A picture that can't be read is reported, the others are still done.

    Args:
        probabilities_fn: the model.
        inputs: image files and folders of them (see `find_images`).
        out: folder for the masks; made if needed. Earlier masks in it are replaced.
        image_size: side in pixels of the square that the model sees.
        threshold: probability above which a pixel counts as lesion.
        batch_size: images in a batch.
        overlay: also write `<name>_overlay.png`, the picture with the mask's outline.
        clean: fill holes and keep the largest component (`clean_up`).
        progress: show a progress bar.

    Raises:
        DataError: a folder holds no image, two inputs would write the same file, a result
            would replace an input, or `out` is not a folder. Nothing has been written then.
    """
    images, passed_over = find_images(inputs)
    _check_outputs(images, out, (MASK_SUFFIX, OVERLAY_SUFFIX) if overlay else (MASK_SUFFIX,))
    report = PredictionReport(passed_over=passed_over)

    def write(path: Path, mask: np.ndarray) -> Path:
        if clean:
            mask = clean_up(mask)
        if overlay:
            picture = draw_overlay(read_image(path), mask)
            write_atomically(out / f"{path.stem}{OVERLAY_SUFFIX}.png", encode_png(picture))
        return write_mask(out, path.stem, mask)

    results = predict_each(
        probabilities_fn,
        images,
        read_image,
        write,
        image_size=image_size,
        threshold=threshold,
        batch_size=batch_size,
    )
    for path, result in Bar("predict", len(images), results, leave=True, show=progress):
        if isinstance(result, DataError):
            report.failed.append((path, str(result)))
        else:
            report.written.append(result)
    return report


def predict_each(
    probabilities_fn: ProbabilitiesFn,
    items: Sequence[Item],
    read: Callable[[Item], np.ndarray],
    finish: Callable[[Item, np.ndarray], Result],
    *,
    image_size: int,
    threshold: float,
    batch_size: int,
) -> Iterator[tuple[Item, Result | DataError]]:
    """Predict many pictures, several in flight, in bounded memory.

    Threads read ahead and finish behind while the model computes. The last batch is filled
    up with black images, so that the model is compiled once.

    Args:
        read: an item's picture, uint8 `[height, width, 3]`.
        finish: called in a thread with the item and its mask at the picture's own size,
            uint8 `[height, width]` of 0 and 255.

    Yields:
        Each item once, in order, with what `finish` returned; an item whose `read` raised a
        `DataError` comes with that error, as soon as it is met.
    """
    finishing: deque[tuple[Item, Future[Result]]] = deque()

    def shrink(item: Item) -> _Small:
        image = read(item)
        height, width, _ = image.shape
        return _Small(height, width, resize_image(image, image_size, image_size))

    def complete(item: Item, small: _Small, probabilities: np.ndarray) -> Result:
        return finish(item, mask_at_size(probabilities, small.height, small.width, threshold))

    def finished() -> Iterator[tuple[Item, Result]]:
        while finishing:
            item, future = finishing.popleft()
            yield item, future.result()

    with ThreadPoolExecutor(_THREADS) as pool:
        batch: list[tuple[Item, _Small]] = []

        def predict() -> Iterator[tuple[Item, Result]]:
            stacked = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
            stacked[: len(batch)] = [small.pixels for _, small in batch]
            probabilities = _probabilities(probabilities_fn, stacked)[..., 0]
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
    path = out / f"{name}{MASK_SUFFIX}.png"
    write_atomically(path, encode_png(mask))
    return path


def zip_masks(folder: Path, path: Path) -> None:
    """Pack all `*_segmentation.png` of `folder` into a flat zip, as the challenge takes them.

    Raises:
        DataError: the folder holds no mask.
    """
    masks = sorted(folder.glob(f"*{MASK_SUFFIX}.png"))
    if not masks:
        raise DataError(f"{folder} holds no *{MASK_SUFFIX}.png to pack into {path}.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for mask in masks:
            archive.write(mask, mask.name)
    write_atomically(path, buffer.getvalue())


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


def _probabilities(probabilities_fn: ProbabilitiesFn, images: np.ndarray) -> np.ndarray:
    """What the model gives, checked, as float32 on the host."""
    probabilities = np.asarray(probabilities_fn(images), dtype=np.float32)
    if probabilities.shape != (*images.shape[:3], 1):
        raise ValueError(
            f"probabilities_fn gave the shape {probabilities.shape} for images of shape "
            f"{images.shape}, but must give {(*images.shape[:3], 1)}."
        )
    return probabilities


def _check_outputs(images: list[Path], out: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse results that would replace each other or an input; make the folder."""
    by_stem: dict[str, list[Path]] = {}
    for path in images:
        by_stem.setdefault(path.stem, []).append(path)
    for stem, paths in by_stem.items():
        if len(paths) > 1:
            raise DataError(
                f"{' and '.join(map(str, paths))} would all be written to "
                f"{out / stem}{MASK_SUFFIX}.png. Rename them, or use an output folder for each."
            )
    results = {
        (out / f"{stem}{suffix}.png").resolve() for stem in by_stem for suffix in suffixes
    }
    for path in images:
        if path.resolve() in results:
            raise DataError(f"{path} is an input and would be replaced. Don't write to {out}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{out} is not a folder: masks can't be written there.") from error
