"""PyTorch weights of a run: `python experiments/export_pytorch.py RUN --out FILE`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script

from jaxunet.interop.runs import export_weights


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py or import_pytorch.py."""
    out: Path
    """File to write, .pth, .pt or .safetensors; it loads with strict=True. The averaged weights
    where the run has some (--optimizer.ema-decay)."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint: the last one, or the best on the validation split."""


def main() -> None:
    arguments = parse(Arguments, "Write a run's weights for PyTorch.")
    layout = export_weights(arguments.run, arguments.out, arguments.checkpoint)
    print(f"Written: {arguments.out}, {layout} layout")


if __name__ == "__main__":
    run_script(main)
