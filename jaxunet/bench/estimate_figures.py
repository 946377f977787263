"""What `experiments/compile_ahead.py` found, drawn: where a step's time goes."""

from pathlib import Path
from typing import Any

from jaxunet.bench.estimate import ESTIMATE
from jaxunet.bench.program import KINDS
from jaxunet.bench.steps import MODES
from jaxunet.runs.canvas import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Figure,
    finish,
    save,
    with_own_settings,
)

COLOURS = dict(zip(KINDS, (BLUE, VERMILLION, ORANGE, SKY, GREEN, PURPLE), strict=True))


@with_own_settings
def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a bar for each training step (or what else was compiled) to the PNG file `path`.

    Its parts are kinds of operations. With other results beside, theirs come first; with
    several topologies, what the collectives take is drawn at the end, hatched.
    """
    bars = []
    for title, points in (("before", result.get("beside", [])), ("", result["points"])):
        for point in points:
            for mode in MODES:
                if "step_seconds" in point.get(mode, {}):
                    bars.append((_label(point, mode, title), point[mode]))
    if result.get("beside"):
        bars.sort(key=lambda bar: bar[0].split(",")[0])
    scaling = bool(result.get("weak_scaling"))
    figure = Figure(figsize=(9, 1.6 + 0.42 * max(1, len(bars))), layout="constrained")
    axes = figure.subplots()
    ends = []
    for place, (_, entry) in enumerate(bars):
        end = 0.0
        for kind in KINDS:
            part = 1e3 * entry["seconds_by_kind"][kind]
            label = kind if place == 0 and kind != "collective" else None
            axes.barh(place, part, left=end, color=COLOURS[kind], height=0.7, label=label)
            end += part
        if scaling:
            part = 1e3 * entry["collective_seconds"]
            label = "collectives, at best" if place == 0 else None
            axes.barh(
                *(place, part),
                left=end,
                height=0.7,
                label=label,
                facecolor="none",
                edgecolor=PURPLE,
                hatch="////",
            )
            end += part
        ends.append(end)
        axes.annotate(
            f"{end:#.3g} ms, {entry['share_of_peak']:.0%} of peak",
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=BLACK,
        )
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(ends, default=1))  # room for what stands beside the bars
    axes.set_axisbelow(True)
    finish(axes, f"Steps compiled ahead\n({ESTIMATE})", "milliseconds a step", "")
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    save(figure, path)


def _label(point: dict[str, Any], mode: str, title: str) -> str:
    setting = point["setting"]
    words = [setting["topology"], f"batch {setting['batch_size']}", setting["dtype"]]
    words += [setting["parallel"], mode]
    return ", ".join([*words, title] if title else words)
