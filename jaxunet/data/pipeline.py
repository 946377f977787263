"""Batches of uint8 from a prepared dataset: by Grain, or by tf.data.

Both read the same files through the same `BatchReader`, so they yield the same arrays.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Integer

from jaxunet.config import DataConfig
from jaxunet.data.images import resize_image, resize_mask
from jaxunet.data.order import PADDING, Order
from jaxunet.workers import Workers


@runtime_checkable
class Source(Protocol):
    """Examples at random: `[i]` gives `image` and `mask`, uint8 [height, width, 3 and 1]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


HostBatch = dict[str, Integer[np.ndarray, "batch ..."]]

THREADS = 4
PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class BatchReader:
    """Reads global batch number n of `order` from `source`, at `image_size`; picklable."""

    source: Source
    order: Order
    image_size: int

    def __call__(self, batch: int) -> HostBatch:
        """`image` [b, s, s, 3], `mask` [b, s, s, 1], `weight` [b]: this process's rows."""
        indices = self.order.local_indices(int(batch))
        side = self.image_size
        images = np.zeros((len(indices), side, side, 3), np.uint8)
        masks = np.zeros((len(indices), side, side, 1), np.uint8)
        for row, index in enumerate(indices):
            if index != PADDING:
                example = self.source[int(index)]
                images[row] = resize_image(example["image"], side, side)
                masks[row] = resize_mask(example["mask"], side, side)
        weight = (indices != PADDING).astype(np.uint8)
        return {"image": images, "mask": masks, "weight": weight}


class InMemory:
    """A source decoded and resized once, then kept."""

    def __init__(self, source: Source, image_size: int):
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


class Batches(Iterator[HostBatch]):
    """An endless or finite run of batches that can be stopped and taken up again.

    Its state is the number of the next batch: all else follows from the seed, so a state
    saved by any number of processes or workers is good for any other.
    """

    def __init__(self, open_at: Callable[[int], Generator[HostBatch, None, None]]):
        """Args: open_at: batches from a number on; a generator, so that it can be closed."""
        self._open_at = open_at
        self._next = 0
        self._batches: Generator[HostBatch, None, None] | None = None

    def __next__(self) -> HostBatch:
        if self._batches is None:
            self._batches = self._open_at(self._next)
        batch = next(self._batches)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """JSON-able position."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a position that `get_state` gave."""
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Let go of threads, processes and what they have read; the position stays."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def make_batches(source: Source, config: DataConfig, order: Order, last_batch: int) -> Batches:
    """Batches 0 to `last_batch` (exclusive) of `order`, read as `config` says."""
    reader = BatchReader(source, order, config.image_size)
    open_at = _tfdata if config.loader == "tfdata" else _grain
    return Batches(lambda start: open_at(reader, start, last_batch, config.workers))


def _grain(
    reader: BatchReader, start: int, stop: int, workers: int
) -> Generator[HostBatch, None, None]:
    threads = grain.ReadOptions(
        num_threads=workers or THREADS,
        prefetch_buffer_size=max(PREFETCHED_BATCHES, 2 * workers),
    )
    with ExitStack() as stack:
        read = stack.enter_context(closing(Workers(reader, workers))) if workers else reader
        batches = iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(threads))
        stack.callback(batches.close)  # else its threads can keep the process from ending
        yield from batches


def _tfdata(
    reader: BatchReader, start: int, stop: int, workers: int
) -> Generator[HostBatch, None, None]:
    from jaxunet.data.tfdata import iterate  # TensorFlow only where it is asked for

    yield from iterate(reader, start, stop)
