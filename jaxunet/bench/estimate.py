"""What a step would cost on devices that are not there, by the compiler's own estimate."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxunet.bench.program import KINDS, Operation, collectives, operations
from jaxunet.bench.setting import Setting
from jaxunet.bench.steps import MODES, Mode, arguments_of, step_flops, step_of
from jaxunet.config import Config
from jaxunet.devices.ahead import Topology
from jaxunet.devices.chips import H100_CONVOLUTION_SHARE
from jaxunet.devices.strategies import STRATEGIES
from jaxunet.errors import ConfigError
from jaxunet.files import write_atomically
from jaxunet.learning.steps import init_state, make_recipe

ESTIMATE = "estimate of the compiler, not a measurement"
DEAREST = 20

Parallel = Literal["pmap", "jit"]


def estimate(
    topology: Topology,
    config: Config,
    parallel: Parallel,
    modes: tuple[Mode, ...] = MODES,
    hlo: Path | None = None,
) -> dict[str, Any]:
    """The costs of steps on `topology`, as a point of a result.

    Args:
        config: `train.batch_size` is the global batch of every step.
        hlo: file for the optimised program of the first of `modes`.

    Returns:
        `setting`, `chip`, and for each mode `compile_seconds`, `memory`, `flops` and
        `bytes_accessed` of a device, `collectives`, and, where its program fits,
        `step_seconds` with its parts by kind, `images_per_second`, `share_of_peak` and
        the `dearest` operations; on a TPU also `estimated_cycles` and `by_kind` in cycles.
    """
    count = len(topology.devices)
    if config.parts_per_step > 1:
        raise ConfigError(
            "The parts of a batch are one loop, whose turns the compiler does not count: leave "
            "optimizer.accumulate_steps and train.microbatch alone."
        )
    point: dict[str, Any] = {
        "setting": {
            "topology": topology.name,
            **Setting(config, parallel, count).record(),
            "batch_size_per_device": config.train.batch_size // count,
        },
        "chip": vars(topology.chip),
    }
    for mode in modes:
        start = time.perf_counter()
        compiled = compile_step(topology, config, parallel, mode)
        point[mode] = {"compile_seconds": time.perf_counter() - start}
        if isinstance(compiled, str):
            point[mode]["memory"] = {"fits": False, "reason": compiled}
            continue
        if hlo is not None:
            write_atomically(hlo, compiled.as_text())
            hlo = None  # of the first step that there is
        point[mode] |= _costs(compiled, topology, config, mode)
    return point


def _costs(compiled: Any, topology: Topology, config: Config, mode: Mode) -> dict[str, Any]:
    program, costs = compiled.as_text(), compiled.cost_analysis() or {}
    entry: dict[str, Any] = {}
    entry["memory"] = memory(compiled, topology)
    found = operations(program)
    # The compiler for GPU counts neither: these are of products, and of each operation.
    entry["flops"] = costs.get("flops", sum(each.flops for each in found))
    moved = sum(each.moved_bytes for each in found)
    entry["bytes_accessed"] = costs.get("bytes accessed", moved)
    entry["collectives"] = collectives(program)
    entry["collective_seconds"] = _collective_seconds(entry["collectives"], topology)
    seconds = dict.fromkeys(KINDS, 0.0)
    for each in found:
        seconds[each.kind] += seconds_of(each, topology)
    if topology.platform == "tpu":
        cycles = {kind: round(part * topology.chip.clock) for kind, part in seconds.items()}
        entry["estimated_cycles"] = sum(cycles.values())
        entry["by_kind"] = cycles
    total = sum(seconds.values())
    batch_size = config.train.batch_size
    peak = total * topology.chip.flops * len(topology.devices)
    entry["step_seconds"] = total
    entry["seconds_by_kind"] = seconds
    entry["images_per_second"] = batch_size / total if total else None
    entry["share_of_peak"] = step_flops(config, mode, batch_size) / peak if total else None
    dearest = sorted(found, key=lambda each: -seconds_of(each, topology))[:DEAREST]
    entry["dearest"] = [
        {
            "seconds": seconds_of(each, topology),
            **({"cycles": each.cycles} if each.cycles is not None else {}),
            "kind": each.kind,
            "layer": each.layer,
            "backward": each.backward,
            "shape": each.shape,
            "name": each.name,
        }
        for each in dearest
    ]
    return entry


def compile_step(topology: Topology, config: Config, parallel: Parallel, mode: Mode) -> Any:
    """The compiled step; or, where it takes more memory than there is, what XLA says of it."""
    strategy = STRATEGIES[parallel](topology.devices)
    state = jax.eval_shape(partial(init_state, make_recipe(config)))
    arguments = strategy.outline(*arguments_of(mode, state, batch_shapes(config)))
    lowered = step_of(strategy, config, mode).lower(*arguments)
    try:
        return lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return str(error).splitlines()[0]


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a global batch of `train.batch_size` images."""
    count, side = config.train.batch_size, config.data.image_size

    def shape(*sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *sides), jnp.uint8)

    return {"image": shape(side, side, 3), "mask": shape(side, side, 1), "weight": shape()}


def memory(compiled: Any, topology: Topology) -> dict[str, Any]:
    """Bytes of a program on a device, and whether the chip has so many."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    fits = total <= topology.chip.memory
    return {**parts, "in_all": total, "of_chip": topology.chip.memory, "fits": fits}


def seconds_of(operation: Operation, topology: Topology) -> float:
    """The estimate for one operation.

    For a product without the compiler's, as on a GPU, what it computes, at the rate that
    convolutions reach on an H100, or what it moves, at the memory's, whichever takes longer.
    """
    if operation.cycles is not None:
        return operation.cycles / topology.chip.clock
    if operation.flops:
        rate = H100_CONVOLUTION_SHARE * topology.chip.flops
        if operation.operands == "f32":
            rate /= 2  # TF32
        return max(operation.flops / rate, operation.moved_bytes / topology.chip.memory_rate)
    return (operation.microseconds or 0.0) / 1e6


def _collective_seconds(found: dict[str, dict[str, int]], topology: Topology) -> float:
    """At best: every link of a chip busy all the time, and nothing computed meanwhile.

    An all-reduce sends each byte twice, but for the chip's own share; the others once.
    """
    count = len(topology.devices)
    sent = sum((2 if kind == "all-reduce" else 1) * e["bytes"] for kind, e in found.items())
    return sent * (count - 1) / count / topology.chip.link_rate


def weak_scaling(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of train steps with as many images a chip: what more chips would bring.

    Returns:
        For each point the seconds to compute and, after that, to reduce; the images a second
        of all chips together, and what share of the time is spent computing.
    """
    rows = []
    for point in points:
        train = point.get("train", {})
        if "step_seconds" in train:
            computing = train["step_seconds"] - train["seconds_by_kind"]["collective"]
            whole = computing + train["collective_seconds"]
            rows.append(
                {
                    "topology": point["setting"]["topology"],
                    "devices": point["setting"]["devices"],
                    "batch_size": point["setting"]["batch_size"],
                    "compute_seconds": computing,
                    "collective_bytes": sum(e["bytes"] for e in train["collectives"].values()),
                    "collective_seconds": train["collective_seconds"],
                    "images_per_second": point["setting"]["batch_size"] / whole,
                    "share_computing": computing / whole,
                }
            )
    return rows


def largest_batch(topology: Topology, config: Config, parallel: Parallel) -> dict[str, Any]:
    """The largest training batch a device whose program fits its memory, by bisection.

    Returns:
        `batch_size_per_device`, and where train.batch_size is larger than that on all devices
        together `microbatch`, the largest part of it whose program fits; None if none does.
    """
    count = len(topology.devices)

    def fits(images: int, whole: int | None = None) -> bool:
        part = images * count
        microbatch = None if whole is None else part
        train = replace(config.train, batch_size=whole or part, microbatch=microbatch)
        compiled = compile_step(topology, replace(config, train=train), parallel, "train")
        return not isinstance(compiled, str) and memory(compiled, topology)["fits"]

    low, high = 0, max(1, config.train.batch_size // count)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    found: dict[str, Any] = {"remat": config.model.remat, "batch_size_per_device": low}
    if (whole := config.train.batch_size) > low * count:
        parts = [n for n in range(low, 0, -1) if whole % (n * count) == 0]
        fitting = next((n for n in parts if fits(n, whole)), None)
        found["microbatch"] = None if fitting is None else fitting * count
    return found


def points_of(path: Path) -> list[dict[str, Any]]:
    """The points of an earlier result of this kind.

    Raises:
        ConfigError: the file is none, or can't be read.
    """
    try:
        result = json.loads(path.read_bytes())
        points: list[dict[str, Any]] = result["points"] if result["what"] == ESTIMATE else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result of compile_ahead.py: {error!r}") from error
    if not points:
        raise ConfigError(f"{path} holds no estimates: give a NAME.json of compile_ahead.py.")
    return points
