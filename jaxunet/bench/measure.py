"""One point of the benchmark: the contestants of a setting timed in turn, and the results."""

import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from jaxunet.bench.feeding import make_pipeline, make_training
from jaxunet.bench.products import convolutions, make_products
from jaxunet.bench.rounds import Contestant, describe, exponent, ratio, spread, time_rounds
from jaxunet.bench.steps import MODES, initial_state, make_step, step_flops
from jaxunet.config import Config
from jaxunet.data import prepare
from jaxunet.devices.strategies import make_strategy

Measure = Literal["train", "eval", "predict", "pipeline", "training", "preparation", "layers"]
CACHES: tuple[Literal["none", "host", "device"], ...] = ("none", "host", "device")


@dataclass(frozen=True)
class Timing:
    """What is timed, against what, and for how long."""

    measure: tuple[Measure, ...] = ("train", "eval", "predict", "pipeline", "training")
    """What to time: three kinds of step on a batch that lies on the devices; the input
    `pipeline` alone; `training` end to end, under each --data.cache; `preparation` of data:
    decoding and resizing of large JPEGs; `layers`: every 3x3 convolution and its gradients."""
    against: Literal["nothing", "pytorch"] = "nothing"
    """Time PyTorch's steps too, in turn with jaxunet's."""
    rounds: int = 12
    """Timed rounds of each contestant."""
    seconds: float = 1.0
    """Length of a round."""


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    config: Config
    parallel: Literal["pmap", "jit"]
    devices: int

    def record(self) -> dict[str, Any]:
        return {
            "batch_size": self.config.train.batch_size,
            "image_size": self.config.data.image_size,
            "width": self.config.model.width,
            "dtype": self.config.model.dtype,
            "remat": self.config.model.remat,
            "parallel": self.parallel,
            "devices": self.devices,
        }


def measure_steps(setting: Setting, timing: Timing, rate: float) -> dict[str, Any]:
    """Train, eval and predict steps, each with PyTorch's in turn."""
    config = setting.config
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    state = initial_state(config)
    batch_size = config.train.batch_size
    result: dict[str, Any] = {}
    for mode in MODES:
        if mode not in timing.measure:
            continue
        ours = make_step(strategy, config, mode, state, batch_size)
        contestants: dict[str, Contestant] = {"jaxunet": ours}
        theirs: dict[str, Any] = {}
        unavailable: dict[str, str] = {}
        if timing.against == "pytorch":
            from jaxunet.bench.pytorch import make_pytorch_steps

            theirs, unavailable = make_pytorch_steps(config, mode, state, batch_size)
            contestants.update({f"pytorch_{form}": run for form, run in theirs.items()})
        times = time_rounds(contestants, timing.rounds, timing.seconds)
        flops = step_flops(config, mode, batch_size)
        found = describe(times["jaxunet"], batch_size, flops)
        found["share_of_matmul_rate"] = found["flops_per_second"] / (rate * setting.devices)
        found["compile_seconds"] = ours.compile_seconds
        found["cached_compile_seconds"] = ours.cached_compile_seconds
        found["warm_up_seconds"] = ours.warm_up_seconds
        found["program_bytes"] = ours.program_bytes
        entry: dict[str, Any] = {"jaxunet": found}
        if theirs:
            entry["pytorch"] = {
                form: {
                    **describe(times[f"pytorch_{form}"], batch_size, flops),
                    "warm_up_seconds": run.warm_up_seconds,
                }
                for form, run in theirs.items()
            }
            best = min(theirs, key=lambda f: entry["pytorch"][f]["step_seconds"]["median"])
            entry["pytorch_best"] = best
            entry["pytorch_unavailable"] = unavailable
            entry["ratio_to_pytorch"] = ratio(times["jaxunet"], times[f"pytorch_{best}"])
            if ours.loss is not None:
                entry["first_loss"] = {
                    "jaxunet": ours.loss,
                    **{form: run.loss for form, run in theirs.items()},
                }
        entry["memory"] = peak_memory(jax.devices()[0])
        result[mode] = entry
    return result


def peak_memory(device: jax.Device) -> dict[str, int | None]:
    """Peak bytes of the device (None where it doesn't tell) and of this process, so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "device_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "process_bytes": process,
    }


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
        contestants: dict[str, Contestant] = {
            "step": make_step(strategy, config, "train", state, batch_size)
        }
        for cache in CACHES:
            cached = replace(config, data=replace(config.data, cache=cache))
            contestants[cache] = make_training(strategy, cached, source, state)
        times = time_rounds(contestants, timing.rounds, timing.seconds)
        result["step"] = describe(times["step"], batch_size)
        result["training"] = {
            cache: {
                **describe(times[cache], batch_size),
                "ratio_to_step": ratio(times[cache], times["step"]),
            }
            for cache in CACHES
        }
    return result


def fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The powers of batch size, image size and width that time and memory grow with."""
    found = {}
    for axis in ("batch_size", "image_size", "width"):
        others = [{k: v for k, v in p["setting"].items() if k != axis} for p in points]
        same = [p for p, rest in zip(points, others, strict=True) if rest == others[-1]]
        sizes = [p["setting"][axis] for p in same]
        if len(set(sizes)) < 3 or not all("train" in p for p in same):
            continue
        ours = [p["train"]["jaxunet"] for p in same]
        found[axis] = {
            "values": sizes,
            "step_time_exponent": exponent(sizes, [o["step_seconds"]["median"] for o in ours]),
        }
        if all(o["program_bytes"] for o in ours):
            found[axis]["memory_exponent"] = exponent(sizes, [o["program_bytes"] for o in ours])
    return found


def write_trace(setting: Setting, folder: Path) -> None:
    """A profile of three training steps."""
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    state = initial_state(setting.config)
    step = make_step(strategy, setting.config, "train", state, setting.config.train.batch_size)
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        step(3)
