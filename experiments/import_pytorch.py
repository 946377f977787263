"""A run from PyTorch weights: `python experiments/import_pytorch.py WEIGHTS --out RUN`."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script

from jaxunet.config import Config, DataConfig, OptimizerConfig, TrainConfig
from jaxunet.interop.runs import IMPORT_FILE, import_weights


@dataclass(frozen=True)
class Arguments:
    weights: Annotated[Path, tyro.conf.Positional]
    """PyTorch weights, .pth, .pt or .safetensors, of the reference design or of
    milesial/Pytorch-UNet, under any prefix (module., _orig_mod., a Lightning attribute) and
    in any dictionary of the file that alone holds some; no code in them is run."""
    out: Path
    """Run directory to make: evaluate.py and predict.py use it as it is, and train.py --resume
    fine-tunes it with the options given here."""
    data: DataConfig = field(default_factory=lambda: DataConfig(name="isic2018"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def main() -> None:
    arguments = parse(Arguments, "Make a run directory from PyTorch weights.")
    config, layout = import_weights(
        arguments.weights,
        arguments.out,
        Config(data=arguments.data, optimizer=arguments.optimizer, train=arguments.train),
    )
    model = config.model
    print(
        f"Imported:   {arguments.weights}, {layout} layout: width {model.width}, "
        f"{model.depth} levels, {model.upsampling} upsampling, {model.num_logits} logit(s)"
    )
    record = json.loads((arguments.out / IMPORT_FILE).read_text(encoding="utf-8"))
    if place := ".".join(filter(None, (record["dictionary"], record["prefix"]))):
        left_out = ", ".join(record["left_out"]) or "nothing"
        print(f"Taken:      what is under {place}; left out: {left_out}")
    print(f"Run:        {arguments.out}, for images of {config.data.image_size} px")
    print(f"Next:       python experiments/predict.py {arguments.out} IMAGES --out MASKS")


if __name__ == "__main__":
    run_script(main)
