"""Which of two runs is better: `python experiments/compare.py RUN_A RUN_B --split SPLIT`."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script
from model_options import ModelOptions, check_replaces
from rich.console import Console
from rich.table import Table

from jaxunet.devices.environment import command_line, environment
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import DataError
from jaxunet.files import check_writable, write_json
from jaxunet.inference import comparison
from jaxunet.provenance import disagreement
from jaxunet.ranges import require_at_least
from jaxunet.runs.evaluation import Evaluation
from jaxunet.runs.loading import compile_masks
from jaxunet.runs.own_data import own_split
from jaxunet.runs.record import load_config
from jaxunet.runs.reporting import drawn, prediction_rows
from jaxunet.runs.scoring import evaluate_split

OF_THE_IMAGES = ("name", "fingerprint", "count")
"""What of a dataset's description is equal if its images are."""


@dataclass(frozen=True)
class Arguments(ModelOptions):
    first: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py."""
    second: Annotated[Path, tyro.conf.Positional]
    """Another one, of the same data."""
    split: str = "validation"
    """Split to score both on; TFDS slices such as `test[:100]` work."""
    out: Path | None = None
    """Folder for comparison-SECOND-SPLIT.json and .png (none: the first run's)."""
    pictures: int = 6
    """How many of the images that differ most to draw."""

    def __post_init__(self) -> None:
        require_at_least("--pictures", self.pictures, 1)


class Scored:
    """A run's model, and how it scored on a split."""

    def __init__(self, run: Path, options: Arguments):
        self.strategy, self.split = make_strategy("pmap"), options.split
        self.model, self.clean = options.load(run, self.strategy), options.clean
        config = self.model.config.data
        data, self.dataset = own_split(
            self.model, self.split, advice="Scores of data that changed do not compare."
        )
        self.ids, self.source = data.ids(self.split), data.source(self.split)
        self.evaluation: Evaluation = evaluate_split(
            self.model, self.strategy, data, self.split, config, clean=self.clean
        )
        self.evaluation.require_finite(self.model.step, f"{config.name} {self.split}")

    def rows(self, chosen: list[int]) -> list[Any]:
        model = self.model
        return prediction_rows(
            [(index, "") for index in chosen],
            compile_masks(self.strategy, model.recipe, model.variables, clean=self.clean),
            self.evaluation.counts,
            self.source,
            model.config,
        )


def show(found: dict[str, dict[str, Any]], names: tuple[str, str], images: int) -> None:
    table = Table(title=f"{images} images, each scored with both", title_justify="left")
    for heading in ("score", *names, "difference", "95% interval", "Wilcoxon's p"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name, each in found.items():
        low, high = each["interval"]
        table.add_row(
            name.replace("_", " "),
            *(f"{each[key]:.4f}" for key in ("first", "second")),
            f"{each['difference']:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            f"{each['p']:.2g}",
        )
    Console(width=max(100, Console().width)).print(table)


def check_same(first: Scored, second: Scored, runs: tuple[Path, Path]) -> None:
    """Raise `DataError` unless both were scored on the same images."""
    one, other = (
        {name: each.dataset[name] for name in OF_THE_IMAGES} for each in (first, second)
    )
    recorded, there = f"{runs[0]}, of {one['name']},", f"{runs[1]}, of {other['name']}"
    differing = disagreement(one, other, recorded=recorded, there=there)
    if not differing and first.ids != second.ids:
        images = sorted(set(first.ids) ^ set(second.ids))[:3]
        differing = f"{recorded} does not fit {there}. Differing: {', '.join(images)}."
    if differing:
        raise DataError(
            f"{differing} Only scores of the same images can be compared one by one: give "
            "runs of one dataset."
        )


def main() -> None:
    arguments = parse(Arguments, "Compare two runs image by image.")
    first, second, split = arguments.first, arguments.second, arguments.split
    out = arguments.out or first
    for run in (first, second):
        load_config(run)
    path = out / f"comparison-{second.resolve().name}-{arguments.file_name(split)}.json"
    runs = [str(run.resolve()) for run in (first, second)]
    check_replaces(path, "runs", ", ".join(runs), lambda result: ", ".join(result["runs"]))
    check_writable(out, "--out" if arguments.out else "RUN_A")
    arguments.use_tuning((first, second))
    one, other = (Scored(run, arguments) for run in (first, second))
    check_same(one, other, (first, second))
    counts = one.evaluation.counts, other.evaluation.counts
    found = comparison.compare(*counts)
    chosen = comparison.most_different(*counts, arguments.pictures)
    write_json(
        path,
        {
            "runs": runs,
            "checkpoint": arguments.checkpoint,
            "datasets": [each.dataset for each in (one, other)],
            "steps": [each.model.step for each in (one, other)],
            "models": [arguments.described(each.model) for each in (one, other)],
            "scores": found,
            "most_different": [one.ids[index] for index in chosen],
            "command": command_line(),
            **environment(),
        },
    )
    names = (first.resolve().name, second.resolve().name)
    names = names if names[0] != names[1] else ("first", "second")
    show(found, names, len(one.ids))
    picture = path.with_suffix(".png")
    rows = list(zip(one.rows(chosen), other.rows(chosen), strict=True))
    pictures = drawn(picture, partial(comparison.draw, *counts, rows, picture, names))
    print(f"Written: {', '.join(map(str, [path, *pictures]))}")


if __name__ == "__main__":
    run_script(main)
