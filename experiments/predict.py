"""Masks for pictures: `python experiments/predict.py RUN IMAGE_OR_FOLDER... --out DIR`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from command_line import parse, run_script

from jaxunet.parallel import make_strategy
from jaxunet.prediction import predict_files
from jaxunet.trained import compile_probabilities, load


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py."""
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, and folders of pictures."""
    out: Path
    """Folder to write `<name>_segmentation.png` to, at each picture's own size."""
    overlay: bool = False
    """Also write `<name>_overlay.png`: the picture with the lesion's outline."""
    clean: bool = False
    """Fill holes and keep the largest region only."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint: the last one, or the best on the validation split."""
    batch_size: int = 4
    """Pictures predicted at a time (rounded up to a multiple of the devices)."""


def main() -> int:
    arguments = parse(Arguments, "Predict masks for pictures.")
    model = load(arguments.run, arguments.checkpoint)
    strategy = make_strategy("pmap")
    devices = jax.device_count()
    report = predict_files(
        compile_probabilities(strategy, model.recipe, model.variables),
        list(arguments.inputs),
        arguments.out,
        image_size=model.config.data.image_size,
        threshold=model.config.train.threshold,
        batch_size=-(-arguments.batch_size // devices) * devices,
        overlay=arguments.overlay,
        clean=arguments.clean,
        progress=True,
    )
    for _, reason in report.failed:
        print(f"not predicted: {reason}")
    print(f"{len(report.written)} files written to {arguments.out}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    run_script(main)
