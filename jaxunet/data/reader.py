"""Reading global batches from a source of examples, and keeping what was read."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from jaxunet.config import IGNORED
from jaxunet.data.images import resize_image, resize_mask
from jaxunet.data.sampler import PADDING, BatchSampler
from jaxunet.errors import DataError


@runtime_checkable
class DataSource(Protocol):
    """Examples at random: `[i]` gives `image` and `mask`, uint8 [height, width, 3 and 1].

    A mask holds 0, 255 for lesion, and `IGNORED` where a pixel doesn't count.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


HostBatch = dict[str, Integer[np.ndarray, "batch ..."]]

THREADS = 4
PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class BatchReader:
    """Reads global batch number n of `order` from `source`, at `image_size`; picklable."""

    source: DataSource
    order: BatchSampler
    image_size: int

    def __call__(self, batch: int) -> HostBatch:
        """`image` [b, s, s, 3], `mask` [b, s, s, 1], `weight` [b]: this process's rows.

        Raises:
            DataError: of what a mask has left at this size no pixel counts.
        """
        indices = self.order.local_indices(int(batch))
        side = self.image_size
        images = np.zeros((len(indices), side, side, 3), np.uint8)
        masks = np.zeros((len(indices), side, side, 1), np.uint8)
        for row, index in enumerate(indices):
            if index != PADDING:
                example = self.source[int(index)]
                images[row] = resize_image(example["image"], side, side)
                masks[row] = resize_mask(example["mask"], side, side)
                if masks[row, 0, 0, 0] == IGNORED and (masks[row] == IGNORED).all():
                    raise DataError(
                        f"Of the mask of {example.get('id', f'example {index}')} no pixel that "
                        f"counts is left at {side} x {side}: nothing can be learnt from it or "
                        "scored. Take the image away, or raise data.image_size and "
                        "data.stored_size."
                    )
        weight = (indices != PADDING).astype(np.uint8)
        return {"image": images, "mask": masks, "weight": weight}


class InMemory:
    """A source decoded and resized once, then kept."""

    def __init__(self, source: DataSource, image_size: int):
        # Prepared at the same size, the reader's own resize is the identity.
        self._examples: list[dict[str, Any] | None] = [None] * len(source)
        self._source, self._size = source, image_size
        self._locks = [threading.Lock() for _ in range(len(source))]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._locks[index]:
            example = self._examples[index]
            if example is None:
                example = dict(self._source[index])
                example["image"] = resize_image(example["image"], self._size, self._size)
                example["mask"] = resize_mask(example["mask"], self._size, self._size)
                self._examples[index] = example
            return example
