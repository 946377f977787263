"""How the examples of a split reach the devices: read as it goes, or kept somewhere nearer.

    none    read and decoded for each batch
    host    decoded once, kept in the host's memory
    device  decoded once, kept in each device's memory as uint8; a batch is a list of indices,
            and the compiled step gathers its images

The batches are the same, bit for bit.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxunet.bars import Bar
from jaxunet.config import DataConfig
from jaxunet.data.pipeline import Batches, make_batches
from jaxunet.data.reader import THREADS, BatchReader, DataSource, HostBatch, InMemory
from jaxunet.data.sampler import PADDING, BatchSampler
from jaxunet.devices.strategies import Outputs, Step, Strategy
from jaxunet.errors import ConfigError

READ_AT_ONCE = 32  # examples


class Feed:
    """The examples of one split on their way to the devices of `strategy`."""

    def __init__(
        self,
        strategy: Strategy,
        source: DataSource,
        config: DataConfig,
        *,
        progress: bool = True,
        fill: bool = True,
    ):
        """Prepare to feed; with a cache on the devices, read the whole split.

        Args:
            fill: False to leave that to `fill`.

        Raises:
            ConfigError: the split is larger than the memory of a device.
        """
        self.strategy, self.config = strategy, config
        self.source = InMemory(source, config.image_size) if config.cache == "host" else source
        self._progress = progress
        self._from_device = config.cache == "device"
        self._on_devices: Any = None
        if self._from_device:
            _check_fits(len(source), config.image_size)
        if fill:
            self.fill()

    def fill(self) -> None:
        """Put the whole split on the devices if it is to lie there; before the first step."""
        if self._from_device and self._on_devices is None:
            whole = read_all(self.source, self.config, self._progress)
            self._on_devices = self.strategy.replicate(whole)

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, order: BatchSampler, last_batch: int) -> Batches:
        """Batches 0 to `last_batch` (exclusive) on the host, for `place`."""
        if not self._from_device:
            return make_batches(self.source, self.config, order, last_batch)
        return Batches(lambda start: _index_batches(order, start, last_batch))

    def place(self, batch: HostBatch) -> Any:
        """A batch of `batches` on the devices, as a compiled step takes it."""
        return self.strategy.split(batch)

    def compile(self, step: Step, *, outputs: Outputs, donate: bool = False) -> Step:
        """`Strategy.compile` of a step whose batches come from `place`."""
        if not self._from_device:
            return self.strategy.compile(step, outputs=outputs, donate=donate)

        def gathering_step(replicated: Any, batch: Any, split: Any) -> Any:
            return step(replicated, gather(split, batch))

        compiled = self.strategy.compile(
            gathering_step, outputs=outputs, donate=donate, constants=1
        )
        return _FromDevice(self, compiled)

    def lower(self, step: Step, replicated: Any, batch_size: int) -> jax.stages.Lowered:
        """A step of `compile`, lowered for global batches that are not there yet.

        Args:
            replicated: a tree of arrays or shapes as the step takes it; nothing is read.
        """

        def shape(*sizes: int, dtype: Any = np.uint8) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype)

        def examples(count: int) -> dict[str, jax.ShapeDtypeStruct]:
            side = self.config.image_size
            return {"image": shape(count, side, side, 3), "mask": shape(count, side, side, 1)}

        weight = {"weight": shape(batch_size)}
        if not isinstance(step, _FromDevice):
            batch = examples(batch_size) | weight
            lower: Any = step
            return lower.lower(*self.strategy.outline(replicated, batch))
        batch = {"index": shape(batch_size, dtype=np.int32)} | weight
        both = (replicated, examples(len(self)))
        (replicated, split), batch = self.strategy.outline(both, batch)
        return step.compiled.lower(replicated, batch, split)


class _FromDevice:
    """A step that takes its examples from the split that `feed` has put on the devices."""

    def __init__(self, feed: Feed, compiled: Any):
        self._feed, self.compiled = feed, compiled

    def __call__(self, replicated: Any, batch: Any) -> Any:
        return self.compiled(replicated, batch, self._feed._on_devices)


def read_all(source: DataSource, config: DataConfig, progress: bool) -> HostBatch:
    """All examples in the dataset's order, decoded and resized."""
    order = BatchSampler(len(source), min(READ_AT_ONCE, len(source)))
    reader = BatchReader(source, order, config.image_size)
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(
            Bar(
                "read",
                order.batches_per_epoch,
                pool.map(reader, range(order.batches_per_epoch)),
                show=progress,
            )
        )
    return {
        name: np.concatenate([part[name] for part in parts])[: len(source)]
        for name in ("image", "mask")
    }


def gather(split: Any, batch: Any) -> Any:
    """The images and masks of a whole split that a batch of indices asks for.

    Args:
        split: `image` [n, s, s, 3] and `mask` [n, s, s, 1], uint8.
        batch: `index` int32 [b], -1 for padding, and `weight` uint8 [b].

    Returns:
        `image`, `mask` (zeros for padding) and `weight`, as read from the host.
    """
    index = batch["index"]
    real = (index != PADDING)[:, None, None, None]
    found = {name: jnp.where(real, split[name][index], 0) for name in ("image", "mask")}
    # Gathered once; else the compiler may gather anew for each operation that reads them.
    return {**lax.optimization_barrier(found), "weight": batch["weight"]}


def _index_batches(
    order: BatchSampler, start: int, stop: int
) -> Generator[HostBatch, None, None]:
    for number in range(start, stop):
        index = order.local_indices(number).astype(np.int32)
        yield {"index": index, "weight": (index != PADDING).astype(np.uint8)}


def _check_fits(count: int, side: int) -> None:
    needed = count * side * side * 4
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and needed > limit:
        raise ConfigError(
            f"data.cache 'device' would put {needed / 1e6:,.0f} MB ({count:,} images of {side} "
            f"px) on a device of {limit / 1e6:,.0f} MB; use 'host', or a smaller "
            "data.image_size."
        )
