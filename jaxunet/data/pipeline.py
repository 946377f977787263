"""Batches of uint8 from a prepared dataset: by Grain, or by tf.data.

Both read the same files through the same `BatchReader`, so they yield the same arrays.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing

import grain

from jaxunet.config import DataConfig
from jaxunet.data.reader import (
    PREFETCHED_BATCHES,
    THREADS,
    BatchReader,
    DataSource,
    HostBatch,
)
from jaxunet.data.sampler import BatchSampler
from jaxunet.workers import Workers


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


def make_batches(
    source: DataSource, config: DataConfig, order: BatchSampler, last_batch: int
) -> Batches:
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
