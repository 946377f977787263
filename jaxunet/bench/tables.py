"""What `experiments/benchmark.py` measured, as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jaxunet.bench.scaling import limit
from jaxunet.bench.steps import MODES
from jaxunet.runs.clock import ROWS

PRODUCTS = ("forward", "input_gradient", "kernel_gradient")


def show(result: dict[str, Any]) -> None:
    """A table of every time, and what it is compared with."""
    table = Table(title=title(result), title_justify="left")
    for column in ("", "ms a step", "quartiles", "images/s", "GFLOP/s", "of matmul"):
        table.add_column(column, justify="right" if column else "left")
    for point in result["points"]:
        setting = point["setting"]
        table.add_section()
        table.add_row(
            f"[bold]{setting['network']}, {setting['image_size']} px, batch "
            f"{setting['batch_size']}, {setting['dtype']}"
            + (", remat" if setting["remat"] else "")
            + f", {setting['parallel']}"
        )
        for mode in MODES:
            if mode not in point:
                continue
            entry = point[mode]
            row(table, f"{mode} step, jaxunet", entry["jaxunet"])
            for form, found in entry.get("pytorch", {}).items():
                row(table, f"{mode} step, PyTorch {form}", found)
            for form, reason in entry.get("pytorch_unavailable", {}).items():
                table.add_row(f"{mode} step, PyTorch {form}", "", f"not run: {reason[:40]}")
            if "ratio_to_pytorch" in entry:
                best = entry["pytorch_best"]
                low, high = entry["ratio_to_pytorch"]["quartiles"]
                table.add_row(
                    f"{mode} step over PyTorch's best ({best})",
                    f"[bold]{entry['ratio_to_pytorch']['median']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                )
        if "scaling" in point:
            found = point["scaling"]
            row(table, "train step, one device's part by itself", found["one_device"])
            low, high = found["share"]["quartiles"]
            table.add_row(
                f"share of linear scaling on {found['devices']} devices",
                f"[bold]{found['share']['median']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
        if theirs := point.get("neighbour_images_per_second"):
            neighbour = result["neighbour"]
            row(
                table,
                f"train step, {neighbour['name']} on one {neighbour['device']} (published)",
                _as_measured(theirs, neighbour),
            )
        for mode, reason in point.get("out_of_memory", {}).items():
            table.add_row(f"{mode} step, jaxunet", "", f"not run: {reason[:40]}")
        for name, found in point.get("augmentation", {}).items():
            over = found["ratio_to_step"]["median"]
            what = "train step, augment none" if name == "step" else f"augment {name} alone"
            row(table, f"{what}: {over:.3f} of the step", found)
        if "pipeline" in point:
            row(table, "input pipeline alone", point["pipeline"])
        for cache, found in point.get("training", {}).items():
            over = found["ratio_to_step"]["median"]
            row(table, f"training, cache {cache}: {over:.3f} of the step", found)
    for found in result.get("exported", []):
        table.add_section()
        row(table, f"predict step, jaxunet, for {found['file']}", found["jaxunet"])
        over = found["exported_over_jaxunet"]["median"]
        row(table, f"{found['file']}: {over:.3f} of it", found["exported"])
    if "preparation" in result:
        table.add_section()
        for name, found in result["preparation"].items():
            row(table, f"decode and resize a 6-megapixel JPEG, {name.replace('_', ' ')}", found)
    Console(width=max(140, Console().width)).print(table)
    for point in result["points"]:
        if "scaling" in point:
            print(limit(point))
        if "training" in point:
            show_time(point["training"])
        if "layers" in point:
            show_layers(point["layers"])
    if "neighbour" in result:
        print(f"{result['neighbour']['name']}: {result['neighbour']['source']}")
        for each in result["neighbour"]["differs"]:
            print(f"- {each}")
    for axis, fit in result["fits"].items():
        memory = fit.get("memory_exponent")
        print(
            f"Step time grows with {axis} to the power {fit['step_time_exponent']:.2f}"
            + (f", memory {memory:.2f}" if memory else "")
        )


def show_time(training: dict[str, Any]) -> None:
    """A table of where the time of training end to end went: the rows of a run's own."""
    rows = ("start", "compilation", "data", "steps")
    table = Table(title="End to end, seconds of all rounds together", title_justify="left")
    for column in ("data.cache", *(ROWS[row] for row in rows), "all", "hits, misses"):
        table.add_column(column, justify="right")
    for cache, found in training.items():
        time = found["time"]
        seconds = [time["seconds"].get(row, 0.0) for row in rows]
        cells = [f"{each:.2f}" for each in (*seconds, time["total_seconds"])]
        table.add_row(cache, *cells, "{hits}, {misses}".format_map(time["cache"]))
    Console(width=max(110, Console().width)).print(table)


def _as_measured(images_per_second: float, neighbour: dict[str, Any]) -> dict[str, Any]:
    """A published figure in the form of a measured one; a training step is three passes."""
    seconds = neighbour["batch_size"] / images_per_second
    return {
        "step_seconds": {"median": seconds, "quartiles": [seconds, seconds]},
        "images_per_second": images_per_second,
        "flops_per_second": 3e9 * neighbour["gflops_per_image"] * images_per_second,
    }


def show_layers(layers: list[dict[str, Any]]) -> None:
    """A table of every convolution: milliseconds, and over PyTorch's where it was timed."""
    table = Table(title="3x3 convolutions, ms (over PyTorch)", title_justify="left")
    for column in ("batch, rows, columns, in, out", "layers", *PRODUCTS):
        table.add_column(column.replace("_", " "), justify="right")
    for entry in layers:
        cells = []
        for product in PRODUCTS:
            found = entry[product]
            over = f" ({found['ratio']['median']:.2f})" if "ratio" in found else ""
            cells.append(f"{1e3 * found['jaxunet']['median']:.2f}{over}")
        table.add_row(", ".join(map(str, entry["shape"])), str(len(entry["layers"])), *cells)
    Console(width=max(110, Console().width)).print(table)


def title(result: dict[str, Any]) -> str:
    versions, devices = result["versions"], result["devices"]
    where, loops = devices["kind"], ""
    if devices["platform"] == "cpu":
        where = f"{result['host']['cpu']}, {result['host']['cores']} cores"
        lanes = result["cpu_loops"]
        loops = f"loops of {lanes} lanes" if isinstance(lanes, int) else f"no loops: {lanes}"
    names = [f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions]
    return f"{where}; {', '.join(names)}" + (f"; {loops}" if loops else "")


def row(table: Table, name: str, found: dict[str, Any]) -> None:
    seconds = found["step_seconds"]
    low, high = (1e3 * x for x in seconds["quartiles"])
    flops = found.get("flops_per_second")
    share = found.get("share_of_matmul_rate")
    table.add_row(
        name,
        f"{1e3 * seconds['median']:.1f}",
        f"{low:.1f} to {high:.1f}",
        f"{found['images_per_second']:.1f}",
        f"{flops / 1e9:.0f}" if flops else "",
        f"{share:.0%}" if share else "",
    )
