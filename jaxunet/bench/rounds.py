"""How long something takes: contestants timed in turn, round by round, in one process.

Rounds alternate between contestants and reverse their order each time, so that a machine
that slows down or speeds up does so for all of them alike.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Contestant = Callable[[int], None]
"""Does as many steps as it is told, and returns when the last one is finished."""


def repeated(program: Callable[..., Any], *arguments: Any) -> Contestant:
    """Calls of a JAX program, warm."""

    def run(steps: int) -> None:
        for _ in range(steps):
            result = program(*arguments)
        jax.block_until_ready(result)

    run(1)
    return run


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


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of `sizes` that `values` grow with: slope of a line through the logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope)
