"""Train, eval and predict steps on a batch that lies on the devices, as contestants."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxunet.bench.flops import forward_flops, train_flops
from jaxunet.config import Config
from jaxunet.devices import startup
from jaxunet.devices.strategies import Strategy
from jaxunet.learning.steps import (
    eval_step,
    init_state,
    make_recipe,
    predict_step,
    train_step,
)

Mode = Literal["train", "eval", "predict"]
MODES: tuple[Mode, ...] = get_args(Mode)


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


def initial_state(config: Config) -> Any:
    """The state that training starts from, on the host."""
    return jax.device_get(init_state(make_recipe(config)))


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
        compiled: the program, as XLA gives it.
    """

    step: Callable[[], Any]
    compile_seconds: float
    cached_compile_seconds: float | None
    warm_up_seconds: float
    program_bytes: int | None
    loss: float | None
    compiled: Any

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
        compiled,
    )


def step_of(strategy: Strategy, config: Config, mode: Mode) -> Any:
    """One of jaxunet's steps, jitted, to be lowered for what `arguments_of` gives."""
    recipe = make_recipe(config)
    if mode == "train":
        return strategy.compile(partial(train_step, recipe), outputs="replicated", donate=True)
    if mode == "eval":
        return strategy.compile(partial(eval_step, recipe), outputs="replicated")
    return strategy.compile(partial(predict_step, recipe), outputs="split")


def arguments_of(mode: Mode, state: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """What a step takes of a state and a batch: a replicated tree and a split one."""
    if mode == "train":
        return state, batch
    return state.variables, batch["image"] if mode == "predict" else batch


def _step_and_arguments(
    strategy: Strategy, config: Config, mode: Mode, host_state: Any, batch_size: int
) -> tuple[Any, tuple[Any, Any]]:
    replicated, batch = arguments_of(mode, host_state, random_batch(config, batch_size))
    arguments = strategy.replicate(replicated), strategy.split(batch)
    return step_of(strategy, config, mode), arguments


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
