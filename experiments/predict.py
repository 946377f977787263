"""Masks for pictures: `python experiments/predict.py RUN IMAGE_OR_FOLDER... --out DIR`."""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import jax
import tyro
from command_line import parse, run_script
from model_options import ModelOptions

from jaxunet.data.images import read_image
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import ConfigError
from jaxunet.files import check_writable
from jaxunet.inference.pictures import MASK_SUFFIX, OVERLAY_SUFFIX, PROBABILITY_SUFFIX, plan
from jaxunet.inference.prediction import predict_files
from jaxunet.ranges import require_at_least
from jaxunet.runs.loading import check_together, compile_probabilities
from jaxunet.runs.record import load_config


@dataclass(frozen=True)
class Arguments(ModelOptions):
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py."""
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, and folders of pictures. Run directories before them make an ensemble with
    RUN, whose probabilities are averaged."""
    out: Path
    """Folder to write `<name>_segmentation.png` to, at each picture's own size."""
    overlay: bool = False
    """Also write `<name>_overlay.png`: the picture with the lesion's outline."""
    recursive: bool = False
    """Take the pictures of folders below folders too, and keep that structure under --out."""
    probabilities: bool = False
    """Also write `<name>_probability.png`: 16 bits, 65535 where lesion is certain."""
    batch_size: int = 4
    """Pictures predicted at a time (rounded up to a multiple of the devices)."""

    def __post_init__(self) -> None:
        require_at_least("--batch-size", self.batch_size, 1)


def part(run: Path, inputs: tuple[Path, ...]) -> tuple[list[Path], list[Path]]:
    """The runs and the pictures: a leading folder with a config.json and checkpoints is a run.

    Raises:
        ConfigError: there are only runs.
    """

    def is_run(path: Path) -> bool:
        return (path / "config.json").is_file() and (path / "checkpoints").is_dir()

    more = list(takewhile(is_run, inputs))
    if len(more) == len(inputs):
        raise ConfigError(
            f"There are no pictures to predict: {', '.join(map(str, [run, *more]))} are runs. "
            "Give pictures or folders after them."
        )
    return [run, *more], list(inputs[len(more) :])


def listed(paths: list[Path]) -> str:
    """How many, and the first few by name."""
    names = ", ".join(str(path) for path in paths[:5])
    return f"{len(paths)} file{'s' * (len(paths) > 1)}: {names}{', ...' * (len(paths) > 5)}"


def main() -> int:
    arguments = parse(Arguments, "Predict masks for pictures.")
    suffixes = [MASK_SUFFIX]
    suffixes += [OVERLAY_SUFFIX] * arguments.overlay
    suffixes += [PROBABILITY_SUFFIX] * arguments.probabilities
    runs, inputs = part(arguments.run, arguments.inputs)
    # Whatever is wrong with RUN, inputs or --out is said before the model is loaded.
    check_together(runs, list(map(load_config, runs)))
    arguments.use_tuning(runs)
    if len(runs) > 1:
        print(f"an ensemble of {len(runs)} runs: {', '.join(map(str, runs))}")
    found = plan(
        inputs,
        arguments.out,
        suffixes=tuple(suffixes),
        recursive=arguments.recursive,
    )
    check_writable(arguments.out, "--out")
    if found.others:
        print(f"passed over, no kind of image read here: {listed(found.others)}")
    if found.results:
        print(f"passed over, results or hidden by their names: {listed(found.results)}")
    strategy = make_strategy("pmap")
    model = arguments.load(runs, strategy)
    devices = jax.device_count()
    report = predict_files(
        compile_probabilities(strategy, model.recipe, model.variables),
        found.pictures,
        image_size=model.config.data.image_size,
        threshold=model.recipe.threshold,
        batch_size=-(-arguments.batch_size // devices) * devices,
        overlay=arguments.overlay,
        probabilities=arguments.probabilities,
        clean=arguments.clean,
        read=partial(read_image, max_megapixels=model.config.data.max_megapixels),
        progress=True,
    )
    for _, reason in report.failed:
        print(f"not predicted: {reason}")
    print(f"{len(report.written)} files written to {arguments.out}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    run_script(main)
