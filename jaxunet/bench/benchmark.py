"""How long a step takes: contestants timed in turn, round by round, in one process.

Rounds alternate between contestants and reverse their order each time, so that a machine
that slows down or speeds up does so for all of them alike.
"""

import io
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from jaxunet.bench.flops import forward_flops, layers, train_flops
from jaxunet.config import Config
from jaxunet.data.builder import map_in_threads
from jaxunet.data.images import read_reduced_image, resize_image
from jaxunet.data.reader import DataSource
from jaxunet.data.sampler import BatchSampler
from jaxunet.devices import startup
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import Step, Strategy
from jaxunet.learning.steps import (
    Recipe,
    eval_step,
    init_state,
    make_recipe,
    predict_step,
    train_step,
)
from jaxunet.model.layers import conv3x3
from jaxunet.runs.journal import STEPS_IN_FLIGHT

Mode = Literal["train", "eval", "predict"]
MODES: tuple[Mode, ...] = ("train", "eval", "predict")


Contestant = Callable[[int], None]
"""Does as many steps as it is told, and returns when the last one is finished."""


def time_rounds(
    contestants: Mapping[str, Contestant], rounds: int, seconds_per_round: float
) -> dict[str, list[float]]:
    """Seconds a step of each contestant in each of `rounds` rounds.

    Contestants must be warm. A round does as many steps as take about
    `seconds_per_round`, at least one.
    """
    steps = {}
    for name, run in contestants.items():
        start = time.perf_counter()
        run(1)
        steps[name] = max(1, round(seconds_per_round / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            contestants[name](steps[name])
            times[name].append((time.perf_counter() - start) / steps[name])
    return times


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, least, and number of values."""
    first, median, third = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {
        "median": median,
        "quartiles": [first, third],
        "least": min(values),
        "rounds": len(values),
    }


def describe(times: Sequence[float], images: int, flops: float = 0) -> dict[str, Any]:
    """One contestant's times with what follows from them.

    Args:
        images: in a step's global batch.
        flops: of a step; 0 where that means nothing.
    """
    result: dict[str, Any] = {"step_seconds": spread(times)}
    median = result["step_seconds"]["median"]
    result["images_per_second"] = images / median
    if flops:
        result["flops_per_step"] = flops
        result["flops_per_second"] = flops / median
    return result


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Times over another's, round by round; below 1 where the first is ahead."""
    return spread([a / b for a, b in zip(times, others, strict=True)])


def matmul_rate(dtype: str, device: jax.Device, seconds: float = 0.3) -> dict[str, Any]:
    """Operations a second of square matrix products on one device: what it can do at best.

    The best of several sizes, each the median of rounds of about `seconds`.
    """
    sizes = (512, 1024, 2048) if device.platform == "cpu" else (4096, 8192, 16384)
    best: tuple[float, int] = (0.0, 0)
    product = jax.jit(jnp.matmul)
    for size in sizes:
        key = jax.random.key(0)
        x = jax.device_put(jax.random.normal(key, (size, size), jnp.dtype(dtype)), device)

        def run(steps: int, x: jax.Array = x) -> None:
            results = [product(x, x) for _ in range(steps)]
            jax.block_until_ready(results[-1])

        run(1)
        times = time_rounds({"product": run}, 5, seconds)["product"]
        rate = 2 * size**3 / spread(times)["median"]
        best = max(best, (rate, size))
    return {"flops_per_second": best[0], "size": best[1], "dtype": dtype}


def random_batch(config: Config, batch_size: int) -> dict[str, np.ndarray]:
    """A seeded batch with nothing in it to learn: the time of a step doesn't depend on it."""
    rng = np.random.default_rng(0)
    side = config.data.image_size
    return {
        "image": rng.integers(0, 256, (batch_size, side, side, 3), np.uint8),
        "mask": rng.integers(0, 2, (batch_size, side, side, 1), np.uint8) * np.uint8(255),
        "weight": np.ones(batch_size, np.uint8),
    }


def step_flops(config: Config, mode: Mode, batch_size: int) -> int:
    """Operations of one step on a global batch; see `jaxunet.bench.flops`."""
    side = config.data.image_size
    count = train_flops if mode == "train" else forward_flops
    return batch_size * count(config.model, side, side)


@dataclass
class StepContestant:
    """A compiled step on a batch that lies on the devices already.

    Attributes:
        compile_seconds: tracing and compilation; on a CPU with the persistent cache on, in
            a process of its own.
        cached_compile_seconds: the same where the cache has the program, as at a second
            start; None where the cache is off.
        warm_up_seconds: the first call.
        program_bytes: memory of arguments, outputs and temporaries on a device.
        loss: of the first training step.
    """

    step: Callable[[], Any]
    compile_seconds: float
    cached_compile_seconds: float | None
    warm_up_seconds: float
    program_bytes: int | None
    loss: float | None

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            result = self.step()
        jax.block_until_ready(result)


def make_step(
    strategy: Strategy, config: Config, mode: Mode, host_state: Any, batch_size: int
) -> StepContestant:
    """Compile one of jaxunet's steps and run it once.

    On a CPU with the persistent cache on, it is compiled in a process of its own and loaded
    here, so that it is timed as from a second start on. Compiling leaves the heap in pieces,
    among which glibc searches long for the blocks that each step asks for.

    Args:
        host_state: a `TrainState` on the host, as of `initial_state`.
    """
    step, arguments = _step_and_arguments(strategy, config, mode, host_state, batch_size)
    settings: Any = jax.config
    compiled: Any
    cached_compile_seconds: float | None
    if not settings.jax_enable_compilation_cache:
        compiled, compile_seconds = _compile(step, arguments)
        cached_compile_seconds = None
    else:
        with tempfile.TemporaryDirectory() as cache, _Cache(cache):
            if strategy.devices[0].platform == "cpu":
                task = (type(strategy), len(strategy.devices), config, mode, batch_size, cache)
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    compile_seconds = pool.submit(_compile_elsewhere, *task).result()
            else:
                _, compile_seconds = _compile(step, arguments)
            compiled, cached_compile_seconds = _compile(step, arguments)
    batch = arguments[1]
    held = [arguments[0]]

    def train_once() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return metrics

    def apply_once() -> Any:
        return compiled(*arguments)

    run = train_once if mode == "train" else apply_once
    start = time.perf_counter()
    first = jax.block_until_ready(run())
    return StepContestant(
        run,
        compile_seconds,
        cached_compile_seconds,
        time.perf_counter() - start,
        _program_bytes(compiled),
        float(strategy.fetch(first)["loss"]) if mode == "train" else None,
    )


def _step_and_arguments(
    strategy: Strategy, config: Config, mode: Mode, host_state: Any, batch_size: int
) -> tuple[Any, tuple[Any, Any]]:
    recipe = make_recipe(config)
    batch = strategy.split(random_batch(config, batch_size))
    state = strategy.replicate(host_state)
    step: Step
    if mode == "train":
        step = strategy.compile(partial(train_step, recipe), outputs="replicated", donate=True)
    elif mode == "eval":
        step = strategy.compile(partial(eval_step, recipe), outputs="replicated")
    else:
        step = strategy.compile(partial(predict_step, recipe), outputs="split")
        batch = batch["image"]
    return step, (state if mode == "train" else state.variables, batch)


def _compile(step: Any, arguments: tuple[Any, Any]) -> tuple[Any, float]:
    """The compiled step, and the seconds that tracing and compiling it, or loading it, took."""
    jax.clear_caches()
    start = time.perf_counter()
    return step.lower(*arguments).compile(), time.perf_counter() - start


def _compile_elsewhere(
    kind: Any, devices: int, config: Config, mode: Mode, batch_size: int, cache: str
) -> float:
    """Seconds to compile a step in this process, which also puts it in the cache."""
    startup.start()
    strategy = kind(jax.devices()[:devices])
    with _Cache(cache):
        step = _step_and_arguments(strategy, config, mode, initial_state(config), batch_size)
        return _compile(*step)[1]


class _Cache:
    """A folder for compiled programs of any size, in place of the user's own."""

    def __init__(self, folder: str) -> None:
        self.settings = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }

    def __enter__(self) -> None:
        self.before = {name: getattr(jax.config, name) for name in self.settings}
        self._set(self.settings)

    def __exit__(self, *_: object) -> None:
        self._set(self.before)

    def _set(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # which decides once where it is


def convolutions(config: Config, batch_size: int) -> dict[tuple[int, ...], list[str]]:
    """The 3x3 convolutions of the model by shape, with the layers that have it.

    Returns:
        Layers by (batch, rows, columns, channels in, channels out).
    """
    found: dict[tuple[int, ...], list[str]] = {}
    side = config.data.image_size
    for name, layer in layers(config.model, side, side).items():
        if layer.kernel[:2] == (3, 3):
            shape = (batch_size, layer.rows, layer.columns, *layer.kernel[2:])
            found.setdefault(shape, []).append(name)
    return found


def random_convolution(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seeded input, kernel and output gradient of a convolution of `shape`, float32."""
    b, h, w, cin, cout = shape
    rng = np.random.default_rng(0)
    shapes = ((b, h, w, cin), (3, 3, cin, cout), (b, h, w, cout))
    x, kernel, dy = (rng.normal(size=each).astype(np.float32) for each in shapes)
    return x, kernel, dy


def make_products(shape: tuple[int, ...], dtype: str) -> dict[str, Contestant]:
    """jaxunet's convolution of one shape and its two gradients, each compiled by itself."""
    x, kernel, dy = (jnp.asarray(a, jnp.dtype(dtype)) for a in random_convolution(shape))

    def input_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: conv3x3(x, kernel), x)[1](dy)[0]

    def kernel_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: conv3x3(x, kernel), kernel)[1](dy)[0]

    def contestant(function: Callable[..., jax.Array], *arguments: jax.Array) -> Contestant:
        compiled = jax.jit(function)

        def run(steps: int) -> None:
            for _ in range(steps):
                result = compiled(*arguments)
            result.block_until_ready()

        run(1)
        return run

    return {
        "forward": contestant(conv3x3, x, kernel),
        "input_gradient": contestant(input_gradient, x, kernel, dy),
        "kernel_gradient": contestant(kernel_gradient, x, kernel, dy),
    }


def initial_state(config: Config) -> Any:
    """The state that training starts from, on the host."""
    recipe: Recipe = make_recipe(config)
    return jax.device_get(jax.jit(partial(init_state, recipe))())


def make_pipeline(strategy: Strategy, config: Config, source: DataSource) -> Contestant:
    """Batches from the source to the devices, and no step at all."""
    feed, batches = _endless(strategy, config, source)

    def run(steps: int) -> None:
        for _ in range(steps):
            placed = feed.place(next(batches))
        jax.block_until_ready(placed)

    run(1)
    return run


def make_training(
    strategy: Strategy, config: Config, source: DataSource, host_state: Any
) -> Contestant:
    """The training loop: the real pipeline, the step, and the metrics fetched late."""
    recipe = make_recipe(config)
    feed, batches = _endless(strategy, config, source)
    step = feed.compile(partial(train_step, recipe), outputs="replicated", donate=True)
    held = [strategy.replicate(host_state)]

    def run(steps: int) -> None:
        in_flight: deque[Any] = deque()
        for _ in range(steps):
            held[0], metrics = step(held[0], feed.place(next(batches)))
            in_flight.append(metrics)
            while len(in_flight) > STEPS_IN_FLIGHT:
                strategy.fetch(in_flight.popleft())
        jax.block_until_ready(held[0])

    run(math.ceil(len(source) / config.train.batch_size))  # an epoch fills the host's cache
    return run


def _endless(strategy: Strategy, config: Config, source: DataSource) -> tuple[Feed, Any]:
    feed = Feed(strategy, source, config.data, progress=False)
    order = BatchSampler(len(source), config.train.batch_size, config.train.seed)
    return feed, feed.batches(order, sys.maxsize // order.batch_size)


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


def _program_bytes(compiled: Any) -> int | None:
    try:
        found = compiled.memory_analysis()
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    if found is None:
        return None
    shared = getattr(found, "alias_size_in_bytes", 0)
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - shared
    )


def peak_memory(device: jax.Device) -> dict[str, int | None]:
    """Peak bytes of the device (None where it doesn't tell) and of this process, so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "device_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "process_bytes": process,
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of `sizes` that `values` grow with: slope of a line through the logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope)


def with_model(config: Config, **changes: Any) -> Config:
    """`config` with other fields of its model."""
    return replace(config, model=replace(config.model, **changes))
