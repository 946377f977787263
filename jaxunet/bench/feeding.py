"""What feeds the steps, as contestants: preparation, the pipeline, the loop round it all."""

import io
import math
import sys
from collections import deque
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxunet.bench.rounds import Contestant
from jaxunet.config import Config
from jaxunet.data.builder import map_in_threads
from jaxunet.data.images import read_reduced_image, resize_image
from jaxunet.data.reader import DataSource
from jaxunet.data.sampler import BatchSampler
from jaxunet.devices.feed import Feed
from jaxunet.devices.idle import Idle
from jaxunet.devices.strategies import Strategy
from jaxunet.learning.steps import make_recipe, train_step
from jaxunet.runs.clock import Clock
from jaxunet.runs.journal import STEPS_IN_FLIGHT


def make_preparation() -> dict[str, Contestant]:
    """Decoding and resizing of a 6-megapixel JPEG to 256 px; a step is one image.

    `full_decode` is plain Pillow on one core, `one_core` and `all_cores` are jaxunet's.
    """
    file = _jpeg(3008, 2000)

    def full(_: int) -> Any:
        with Image.open(io.BytesIO(file)) as image:
            return np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR))

    def reduced(_: int) -> Any:
        image, _size = read_reduced_image(file, 256)
        return resize_image(image, 256, 256)

    def one_by_one(make: Contestant) -> Contestant:
        def run(images: int) -> None:
            for number in range(images):
                make(number)

        return run

    def in_threads(images: int) -> None:
        deque(map_in_threads(reduced, range(images)), maxlen=0)

    in_threads(8)
    return {
        "full_decode": one_by_one(full),
        "one_core": one_by_one(reduced),
        "all_cores": in_threads,
    }


def _jpeg(width: int, height: int) -> bytes:
    """A seeded picture with soft forms and fine noise."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(60, 220, (12, 16, 3), np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels += rng.normal(0, 4, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def make_pipeline(strategy: Strategy, config: Config, source: DataSource) -> Contestant:
    """Batches from the source to the devices, and no step at all."""
    feed, batches = _endless(strategy, config, source)

    def run(steps: int) -> None:
        for _ in range(steps):
            placed = feed.place(next(batches))
        jax.block_until_ready(placed)

    run(1)
    return run


class Training:
    """The training loop, a contestant: the real pipeline, the step, metrics fetched late.

    Attributes:
        time: where all its time went, rounds and what was before them; see
            `jaxunet.runs.clock.Clock.record`.
    """

    def __init__(self, strategy: Strategy, config: Config, source: DataSource, host_state: Any):
        clock = Clock()
        with clock.compiling():
            self._feed, self._batches = _endless(strategy, config, source)
            step = partial(train_step, make_recipe(config))
            self._step = self._feed.compile(step, outputs="replicated", donate=True)
            self._state = strategy.replicate(host_state)
            self.time = clock.record()
        self(math.ceil(len(source) / config.train.batch_size))  # fills the host's cache

    def __call__(self, steps: int) -> None:
        in_flight: deque[Any] = deque()
        clock = Clock()
        with clock.compiling(), closing(Idle(clock.now)) as idle:
            clock.add(self.time)
            clock.turn("steps")
            for _ in range(steps):
                with clock.waiting_for_data(idle):
                    batch = next(self._batches)
                self._state, metrics = self._step(self._state, self._feed.place(batch))
                idle.dispatched(metrics)
                in_flight.append(metrics)
                while len(in_flight) > STEPS_IN_FLIGHT:
                    self._feed.strategy.fetch(in_flight.popleft())
            jax.block_until_ready(self._state)
            self.time = clock.record()


def _endless(strategy: Strategy, config: Config, source: DataSource) -> tuple[Feed, Any]:
    feed = Feed(strategy, source, config.data, progress=False)
    order = BatchSampler(len(source), config.train.batch_size, config.train.seed)
    return feed, feed.batches(order, sys.maxsize // order.batch_size)
