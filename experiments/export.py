"""A run's model for elsewhere: `python experiments/export.py RUN --format onnx --out FILE`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script
from model_options import ModelOptions

from jaxunet.export.files import Format, export
from jaxunet.runs.model_card import write_card


@dataclass(frozen=True)
class Arguments(ModelOptions):
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


def main() -> None:
    arguments = parse(Arguments, "Export a run's model, with what comes before and after it.")
    said = export(
        lambda: arguments.load_to_export(arguments.run),
        arguments.out,
        arguments.format,
        native=arguments.native,
    )
    print(f"Written: {arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    try:
        print(f"Card:    {write_card(arguments.run)}")
    except OSError as error:  # a run that others own; the file is whole
        print(f"Card:    not written: {error.strerror}")
    print(f"By {said['exported_by']} on {said['made']}. {said['use']}")
    if arguments.format == "stablehlo":
        print(
            "JAX promises to read it for six months from then; export the run again after that."
        )


if __name__ == "__main__":
    run_script(main)
