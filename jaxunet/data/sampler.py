"""Which examples make up which global batch: a pure function of seed and batch number.

Every loader and every cache asks this one function, and so does a resumed run. The order
is drawn for the whole dataset before it is divided among processes, so the global batch
does not depend on how many there are.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PADDING = -1


@dataclass(frozen=True)
class BatchSampler:
    """The order of `count` examples over epochs of `batch_size` examples a batch.

    Attributes:
        count: examples in the split.
        batch_size: examples in a global batch. An epoch's last batch is filled up with
            `PADDING`, so every example is seen exactly once an epoch.
        seed: seeds a new shuffle for each epoch; None keeps the dataset's order.
        process_index, process_count: which part of each global batch is this process's.
    """

    count: int
    batch_size: int
    seed: int | None = None
    process_index: int = 0
    process_count: int = 1

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def indices(self, batch: int) -> np.ndarray:
        """Global batch number `batch`, counted from 0 over all epochs: int64 [batch_size]."""
        epoch, place = divmod(batch, self.batches_per_epoch)
        order = _permutation(self.count, self.seed, epoch)
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        missing = self.batch_size - len(chosen)
        return np.pad(chosen, (0, missing), constant_values=PADDING)

    def local_indices(self, batch: int) -> np.ndarray:
        """This process's consecutive part of `indices(batch)`."""
        share = self.batch_size // self.process_count
        first = self.process_index * share
        return self.indices(batch)[first : first + share]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int | None, epoch: int) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    return generator(seed, epoch).permutation(count)


def generator(seed: int, *place: int) -> np.random.Generator:
    """Random numbers of `seed` at `place`, such as an epoch.

    NumPy strings the 32-bit words of all numbers together, so that seed 2**32 + 5 at place 0
    would be seed 5 at place 1; larger seeds keep the two apart.
    """
    if seed < 2**32:
        return np.random.default_rng((seed, *place))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))
