"""What views, an ensemble, a threshold, clean-up and a temperature gain:
`python experiments/gains.py RUN`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script
from model_options import ModelOptions, RunOptions, check_replaces, needs_out, runs_of
from rich.console import Console
from rich.table import Table

from jaxunet.devices import tuning
from jaxunet.devices.environment import command_line, environment
from jaxunet.devices.strategies import make_strategy
from jaxunet.files import check_writable, write_json
from jaxunet.inference.gains import gains
from jaxunet.runs.record import load_config

GAINS = {"dice": "Dice", "iou": "IoU", "threshold_jaccard": "threshold Jaccard"}
ERRORS = {"calibration_error": "calibration error", "cross_entropy": "cross-entropy"}


@dataclass(frozen=True)
class Arguments(RunOptions):
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """More of them, to see what an ensemble of all gains. It needs --out."""
    split: str = "validation"
    """Split to measure on; TFDS slices such as `test[:100]` work."""
    out: Path | None = None
    """Folder for gains-SPLIT.json (none: the run directory)."""


def show(found: dict[str, Any]) -> None:
    dataset = found["dataset"]
    table = Table(
        title=f"{dataset['name']} {dataset['split']}, {dataset['count']} images: each by "
        "itself, and what it changes (95% interval)",
        title_justify="left",
    )
    table.add_column("")
    for heading in (*GAINS.values(), *ERRORS.values()):
        table.add_column(heading)
    averaging = [found["averaging"]] if "averaging" in found else []
    for number, way in enumerate([*found["ways"], *averaging]):
        cells = []
        for name in (*GAINS, *ERRORS):
            if name not in way["scores"]:  # the calibration error is no mean over images
                cells.append("")
                continue
            score = way["scores"][name]
            low, high = score["interval"]
            change = f"\n{score['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
            cells.append(f"{score['first']:.4f}{change if number else ''}")
        table.add_row(way["name"], *cells)
    Console(width=max(160, Console().width)).print(table)


def note(found: dict[str, Any]) -> str:
    """What is to be known when reading the table."""
    validation = found["validation_split"]
    fitted = f"threshold and temperature were fitted on {validation}"
    if found["dataset"]["split"].partition("[")[0] == validation.partition("[")[0]:
        return f"Note: {fitted}, these same pictures: elsewhere they gain less."
    return f"Note: {fitted}."


def main() -> None:
    arguments = parse(Arguments, "Measure what can be had from a trained model.")
    runs, split = (arguments.run, *arguments.others), arguments.split
    out = needs_out(runs, arguments.out)
    for run in runs:
        load_config(run)
    check_writable(out, "--out" if arguments.out else "RUN")
    name = ModelOptions(checkpoint=arguments.checkpoint).file_name(split)
    path = out / f"gains-{name}.json"
    if arguments.out:
        check_replaces(path, "runs", ", ".join(str(run.resolve()) for run in runs), runs_of)
    arguments.use_tuning(runs)
    found = gains(runs, arguments.checkpoint, split, make_strategy("pmap"))
    tuning.keep(runs[0])
    said = note(found)
    write_json(path, {**found, "note": said, "command": command_line(), **environment()})
    show(found)
    print(f"{said}\nWritten: {path}")


if __name__ == "__main__":
    run_script(main)
