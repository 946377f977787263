"""What `experiments/compile_ahead.py` found, as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jaxunet.bench.estimate import ESTIMATE
from jaxunet.bench.program import KINDS
from jaxunet.bench.steps import MODES


def show(result: dict[str, Any]) -> None:
    """Every point's costs, the first training step's dearest operations, and what follows."""
    points = result["points"]
    console = Console(width=max(120, Console().width))
    console.print(_costs(points))
    for point in points[:1]:
        if "dearest" in point.get("train", {}):
            console.print(_dearest(point))
    if result.get("weak_scaling"):
        console.print(_scaling(result["weak_scaling"]))
    for row in result.get("largest_batch", []):
        with_remat = "with" if row["remat"] else "without"
        print(
            f"{row['topology']}: at most {row['batch_size_per_device']} images a chip to train "
            f"on, {with_remat} --model.remat ({ESTIMATE})."
        )


def name_of(point: dict[str, Any]) -> str:
    setting = point["setting"]
    return (
        f"{setting['topology']}, {setting['network']}, {setting['image_size']} px, "
        f"batch {setting['batch_size']}, {setting['dtype']}"
        + (", remat" if setting["remat"] else "")
        + f", {setting['parallel']}"
    )


def _costs(points: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Steps compiled ahead: {ESTIMATE}", title_justify="left")
    for column in ("", *MODES):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, point: dict[str, Any], cell: Any) -> None:
        cells = []
        for mode in MODES:
            try:
                cells.append(cell(point[mode]))
            except (KeyError, TypeError):  # not asked for, or it does not fit
                cells.append("")
        if any(cells):
            table.add_row(name, *cells)

    def total_bytes(entry: dict[str, Any]) -> str:
        memory = entry["memory"]
        if "in_all" not in memory:
            return "more than there is"
        verdict = "fits" if memory["fits"] else "too much"
        return f"{memory['in_all'] / 1e9:.2f} of {memory['of_chip'] / 1e9:.0f}, {verdict}"

    def moved(entry: dict[str, Any]) -> str:
        kinds = entry["collectives"].items()
        return "; ".join(f"{k} {e['count']}, {e['bytes'] / 1e6:.1f} MB" for k, e in kinds)

    for point in points:
        table.add_section()
        table.add_row(f"[bold]{name_of(point)}")
        row("milliseconds a step", point, lambda e: f"{1e3 * e['step_seconds']:.2f}")
        row("  share of the chip's peak", point, lambda e: f"{e['share_of_peak']:.0%}")
        row("  images/s", point, lambda e: f"{e['images_per_second']:,.0f}")
        row("million cycles", point, lambda e: f"{e['estimated_cycles'] / 1e6:.2f}")
        for kind in KINDS:
            row(
                f"  ms of {kind}",
                point,
                lambda e, kind=kind: f"{1e3 * e['seconds_by_kind'][kind]:.2f}",
            )
        row("collectives (not in the time)", point, moved)
        row("  ms at best", point, lambda e: f"{1e3 * e['collective_seconds']:.2f}")
        row("GB of memory a device", point, total_bytes)
        for part in ("arguments", "temporaries", "outputs", "aliased"):
            row(f"  {part}", point, lambda e, part=part: f"{e['memory'][part] / 1e9:.2f}")
        row("GFLOP a device", point, lambda e: f"{e['flops'] / 1e9:,.0f}")
        row("GB accessed", point, lambda e: f"{e['bytes_accessed'] / 1e9:.1f}")
        row("seconds to compile", point, lambda e: f"{e['compile_seconds']:.0f}")
    return table


def _dearest(point: dict[str, Any]) -> Table:
    title = f"The dearest of the train step, {name_of(point)}: {ESTIMATE}"
    table = Table(title=title, title_justify="left")
    for column in ("ms", "kind", "layer", "pass", "result"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for each in point["train"]["dearest"]:
        shape = each["shape"].split("{")[0].lstrip("(")
        way = ("backward" if each["backward"] else "forward") if each["layer"] else ""
        table.add_row(f"{1e3 * each['seconds']:.3f}", each["kind"], each["layer"], way, shape)
    return table


def _scaling(rows: list[dict[str, Any]]) -> Table:
    title = f"Weak scaling, one after the other at the links' published rate: {ESTIMATE}"
    table = Table(title=title, title_justify="left")
    columns = ("chips", "batch", "ms to compute", "MB to reduce", "ms to reduce", "images/s")
    table.add_column("")
    for column in (*columns, "computing"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["topology"],
            str(row["devices"]),
            str(row["batch_size"]),
            f"{1e3 * row['compute_seconds']:.2f}",
            f"{row['collective_bytes'] / 1e6:.1f}",
            f"{1e3 * row['collective_seconds']:.2f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['share_computing']:.0%}",
        )
    return table
