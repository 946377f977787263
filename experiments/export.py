"""A run's model for elsewhere: `python experiments/export.py RUN --format onnx --out FILE`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script

from jaxunet.export.files import Format, export
from jaxunet.learning.views import Views
from jaxunet.runs.model_card import write_card


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py or import_pytorch.py."""
    format: Format
    """`onnx` (extra `[onnx]`), for onnxruntime, also in a browser; or `stablehlo`, for JAX
    alone, on a CPU, a CUDA GPU and a TPU. Both take uint8 pictures `[batch, size, size, 3]`,
    any number of them, and give the probability of lesion `[batch, size, size, 1]`."""
    out: Path
    """File to write."""
    native: bool = False
    """ONNX only: one picture of any size, uint8 `[height, width, 3]`, and the probability at
    that size; resized both ways inside, as predict.py does."""
    views: Views = "none"
    """Average over turned views of the picture, as in evaluate.py; it takes as many times as
    long."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint: the last one, or the best on the validation split."""


def main() -> None:
    arguments = parse(Arguments, "Export a run's model, with what comes before and after it.")
    said = export(
        arguments.run,
        arguments.out,
        arguments.format,
        which=arguments.checkpoint,
        views=arguments.views,
        native=arguments.native,
    )
    card = write_card(arguments.run)
    print(f"Written: {arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB, and {card}")
    print(f"By {said['exported_by']} on {said['made']}. {said['use']}")
    if arguments.format == "stablehlo":
        print(
            "JAX promises to read it for six months from then; export the run again after that."
        )


if __name__ == "__main__":
    run_script(main)
