"""What `experiments/benchmark.py` measured, drawn: times, and what they grow with."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxunet.runs.canvas import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    Figure,
    finish,
    save,
    with_own_settings,
)


def draw(result: dict[str, Any], path: Path, title: str) -> None:
    """Cost against size, if the sweep has only that; else a bar for every time."""
    points = result["points"]
    for axis, fit in result["fits"].items():
        if "memory_exponent" in fit and len(fit["values"]) == len(points):
            scaling(points, axis, path, title)
            return
    throughput(points, path, title)


@with_own_settings
def throughput(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw what `experiments/benchmark.py` measured to the PNG file `path`.

    Of one point, the time of a step of each contestant; of a sweep, the time of a training
    step at each point. Bars are medians, whiskers the quartiles.

    Args:
        points: the result's `points`.
    """
    bars: list[tuple[str, dict[str, Any], str]] = []
    for point in points:
        setting = point["setting"]
        name = (
            f"{setting['network']}, {setting['image_size']} px, "
            f"batch {setting['batch_size']}, {setting['dtype']}"
        )
        for mode in ("train", "eval", "predict"):
            if mode in point and (len(points) == 1 or mode == "train"):
                before = f"{name}\n" if len(points) > 1 else f"{mode}: "
                bars.append((f"{before}jaxunet", point[mode]["jaxunet"], BLUE))
                for form, found in point[mode].get("pytorch", {}).items():
                    bars.append((f"{before}PyTorch {form}", found, ORANGE))
        if len(points) == 1:
            for name, found in point.get("augmentation", {}).items():
                bars.append(("train" if name == "step" else f"augment {name}", found, BLUE))
            if "pipeline" in point:
                bars.append(("input pipeline alone", point["pipeline"], GREEN))
            for cache, found in point.get("training", {}).items():
                bars.append((f"training, cache {cache}", found, GREEN))
    figure = Figure(figsize=(8, 1.2 + 0.38 * max(1, len(bars))), layout="constrained")
    axes = figure.subplots()
    for place, (_, found, colour) in enumerate(bars):
        median = 1e3 * found["step_seconds"]["median"]
        low, high = (1e3 * x for x in found["step_seconds"]["quartiles"])
        axes.barh(place, median, color=colour, height=0.7)
        axes.plot([low, high], [place, place], color=BLACK, linewidth=2)
        axes.annotate(
            f"{median:,.0f}" if median >= 100 else f"{median:.3g}",
            (max(median, high), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    finish(axes, title, "milliseconds a step", "")
    save(figure, path)


@with_own_settings
def scaling(points: list[dict[str, Any]], axis: str, path: Path, title: str) -> None:
    """Draw a training step's time and memory against a size to the PNG file `path`.

    Both on logarithmic axes, with the fitted powers: dots are medians, whiskers quartiles.

    Args:
        points: the result's `points`, in which `axis` of the setting varies.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    sizes = [point["setting"][axis] for point in points]
    ours = [point["train"]["jaxunet"] for point in points]
    times = [1e3 * o["step_seconds"]["median"] for o in ours]
    spread = np.array([[1e3 * x for x in o["step_seconds"]["quartiles"]] for o in ours])
    memory = [o["program_bytes"] / 1e6 for o in ours]
    name = axis.replace("_", " ")
    for axes, values, what in zip(
        figure.subplots(1, 2),
        (times, memory),
        ("milliseconds a step", "MB of the compiled step"),
        strict=True,
    ):
        power, offset = np.polyfit(np.log(sizes), np.log(values), 1)
        axes.loglog(sizes, np.exp(offset) * np.array(sizes) ** power, color=SKY, label="fit")
        axes.plot(sizes, values, "o", color=BLUE, label="measured")
        if values is times:
            axes.vlines(sizes, *spread.T, color=BLACK, linewidth=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        low, high = min(values), max(values)
        ticks = [low * (high / low) ** (step / 3) for step in range(4)]
        axes.set_yticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        finish(axes, f"grows as {name} to the power {power:.2f}", name, what)
    save(figure, path)
