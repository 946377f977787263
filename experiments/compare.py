"""Which of two runs is better: `python experiments/compare.py RUN_A RUN_B --split SPLIT`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script
from rich.console import Console
from rich.table import Table

from jaxunet.data import prepare
from jaxunet.devices import tuning
from jaxunet.devices.environment import command_line, environment
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import DataError
from jaxunet.files import check_writable, write_json
from jaxunet.inference import comparison
from jaxunet.ranges import require_at_least
from jaxunet.runs.evaluation import Evaluation, describe_split
from jaxunet.runs.loading import TrainedModel, compile_probabilities, evaluate_split, load
from jaxunet.runs.record import load_config, recorded_fingerprint, recorded_tuning
from jaxunet.runs.reporting import prediction_rows


@dataclass(frozen=True)
class Arguments(tuning.Tuning):
    first: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py."""
    second: Annotated[Path, tyro.conf.Positional]
    """Another one, trained or to be scored on the same data."""
    split: str = "validation"
    """Split to score both on; TFDS slices such as `test[:100]` work."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoints: the last ones, or the best on the validation split."""
    out: Path | None = None
    """Folder for comparison-SECOND-SPLIT.json and .png (none: the first run's)."""
    pictures: int = 6
    """How many of the images that differ most to draw."""

    def __post_init__(self) -> None:
        require_at_least("--pictures", self.pictures, 1)


class Scored:
    """A run's model, and how it scored on a split."""

    def __init__(self, run: Path, split: str, checkpoint: Literal["latest", "best"]):
        self.model: TrainedModel = load(run, checkpoint)
        config = self.model.config.data
        data = prepare(config, recorded=recorded_fingerprint(run))
        self.dataset, self.ids = describe_split(data, split, config.image_size), data.ids(split)
        self.source, self.strategy = data.source(split), make_strategy("pmap")
        self.evaluation: Evaluation = evaluate_split(
            self.model, self.strategy, data, split, config
        )
        self.evaluation.require_finite(self.model.step, f"{config.name} {split}")

    def rows(self, chosen: list[int]) -> list[Any]:
        config = self.model.config
        return prediction_rows(
            [(index, "") for index in chosen],
            compile_probabilities(self.strategy, self.model.recipe, self.model.variables),
            self.evaluation.counts,
            self.source,
            image_size=config.data.image_size,
            batch_size=tuning.eval_batch_size(config.train),
            threshold=config.train.threshold,
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


def main() -> None:
    arguments = parse(Arguments, "Compare two runs image by image.")
    first, second, split = arguments.first, arguments.second, arguments.split
    out = arguments.out or first
    for run in (first, second):
        load_config(run)
    tuning.use(arguments, first, recorded_tuning(first))
    check_writable(out, "--out" if arguments.out else "RUN_A")
    both = [Scored(run, split, arguments.checkpoint) for run in (first, second)]
    if both[0].ids != both[1].ids:
        differing = sorted(set(both[0].ids) ^ set(both[1].ids))
        raise DataError(
            f"{split} of {first} ({len(both[0].ids)} images) and of {second} "
            f"({len(both[1].ids)}) are not the same images, so that they can't be compared "
            f"one by one: {', '.join(differing[:3]) or 'their order'} differ. Compare runs "
            "that were trained on splits of one dataset."
        )
    counts = both[0].evaluation.counts, both[1].evaluation.counts
    found = comparison.compare(*counts)
    chosen = comparison.most_different(*counts, arguments.pictures)
    names = (first.name, second.name) if first.name != second.name else ("first", "second")
    path = out / f"comparison-{second.name}-{split}.json"
    picture = path.with_suffix(".png")
    rows = list(zip(both[0].rows(chosen), both[1].rows(chosen), strict=True))
    comparison.draw(*counts, rows, picture, names)
    write_json(
        path,
        {
            "runs": [str(first), str(second)],
            "datasets": [each.dataset for each in both],
            "steps": [each.model.step for each in both],
            "scores": found,
            "most_different": [both[0].ids[index] for index in chosen],
            "command": command_line(),
            **environment(),
        },
    )
    show(found, names, len(both[0].ids))
    print(f"Written: {path}, {picture}")


if __name__ == "__main__":
    run_script(main)
