"""The rest of a point of the benchmark: layers, the loops round the step, and what fits."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jaxunet.augmentation_config import STRENGTHS, Strength
from jaxunet.bench.feeding import Training, make_pipeline
from jaxunet.bench.products import convolutions, make_products
from jaxunet.bench.rounds import (
    Contestant,
    describe,
    exponent,
    ratio,
    repeated,
    spread,
    time_rounds,
)
from jaxunet.bench.setting import Setting, Timing
from jaxunet.bench.steps import initial_state, make_step, random_batch
from jaxunet.config import Config
from jaxunet.data import prepare
from jaxunet.devices.strategies import make_strategy
from jaxunet.learning.steps import make_recipe, varied

CACHES: tuple[Literal["none", "host", "device"], ...] = ("none", "host", "device")


def measure_layers(setting: Setting, timing: Timing) -> list[dict[str, Any]]:
    """Each shape of 3x3 convolution: the product and its gradients, beside PyTorch's."""
    config = setting.config
    dtype, batch_size = config.model.dtype, config.train.batch_size
    found = []
    for shape, layers in convolutions(config, batch_size).items():
        entry: dict[str, Any] = {"shape": list(shape), "layers": layers}
        ours = make_products(shape, dtype)
        theirs: dict[str, Contestant] = {}
        if timing.against == "pytorch":
            from jaxunet.bench.pytorch import make_pytorch_products

            theirs = make_pytorch_products(shape, dtype)
        for product, run in ours.items():
            contestants = {"jaxunet": run}
            if theirs:
                contestants["pytorch"] = theirs[product]
            times = time_rounds(contestants, timing.rounds, timing.seconds / 10)
            entry[product] = {name: spread(t) for name, t in times.items()}
            if theirs:
                entry[product]["ratio"] = ratio(times["jaxunet"], times["pytorch"])
        found.append(entry)
    return found


def measure_augmentation(setting: Setting, timing: Timing) -> dict[str, Any]:
    """What each strength does before the train step, in turn with a step that varies nothing.

    It is timed as a program of its own: as a part of the step it is less than what one step
    differs from the next by.
    """
    batch_size = setting.config.train.batch_size

    def at(strength: Strength) -> Config:
        return replace(setting.config, train=replace(setting.config.train, augment=strength))

    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    plain = at("none")
    contestants: dict[str, Contestant] = {
        "step": make_step(strategy, plain, "train", initial_state(plain), batch_size)
    }
    batch = strategy.split(random_batch(plain, batch_size))
    step = strategy.replicate(np.int32(0))
    for strength in STRENGTHS:
        if strength != "none":
            vary = partial(varied, make_recipe(at(strength)))
            contestants[strength] = repeated(
                strategy.compile(vary, outputs="split"), step, batch
            )
    times = time_rounds(contestants, timing.rounds, timing.seconds)
    return {
        name: {
            **describe(times[name], batch_size),
            "ratio_to_step": ratio(times[name], times["step"]),
        }
        for name in contestants
    }


def measure_loops(setting: Setting, timing: Timing) -> dict[str, Any]:
    """The pipeline alone and training end to end, each cache in turn with the step alone."""
    config, batch_size = setting.config, setting.config.train.batch_size
    data = prepare(config.data)
    source = data.source(config.data.train_split)
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    result: dict[str, Any] = {"examples": len(source)}
    if "pipeline" in timing.measure:
        run = make_pipeline(strategy, config, source)
        times = time_rounds({"pipeline": run}, timing.rounds, timing.seconds)
        result["pipeline"] = describe(times["pipeline"], batch_size)
    if "training" in timing.measure:
        state = initial_state(config)
        step = make_step(strategy, config, "train", state, batch_size)
        loops: dict[str, Training] = {
            cache: Training(
                strategy, replace(config, data=replace(config.data, cache=cache)), source, state
            )
            for cache in CACHES
        }
        times = time_rounds({"step": step, **loops}, timing.rounds, timing.seconds)
        result["step"] = describe(times["step"], batch_size)
        result["training"] = {
            cache: {
                **describe(times[cache], batch_size),
                "ratio_to_step": ratio(times[cache], times["step"]),
                "time": loop.time,
            }
            for cache, loop in loops.items()
        }
    return result


def fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The powers of batch size, image size and width that time and memory grow with."""
    found = {}
    for axis in ("batch_size", "image_size", "width"):
        others = [{k: v for k, v in p["setting"].items() if k != axis} for p in points]
        same = [
            point
            for point, rest in zip(points, others, strict=True)
            if rest == others[-1] and "train" in point  # for which there was memory
        ]
        sizes = [p["setting"][axis] for p in same]
        if len(set(sizes)) < 3:
            continue
        ours = [p["train"]["jaxunet"] for p in same]
        found[axis] = {
            "values": sizes,
            "step_time_exponent": exponent(sizes, [o["step_seconds"]["median"] for o in ours]),
        }
        if all(o["program_bytes"] for o in ours):
            found[axis]["memory_exponent"] = exponent(sizes, [o["program_bytes"] for o in ours])
    return found
