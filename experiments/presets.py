"""Named configurations. Each docstring holds the command, and the time and the score to expect
where they were measured."""

from dataclasses import replace
from pathlib import Path

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

_PRETRAINED = ModelConfig(
    encoder="efficientnet_lite0", weights="imagenet", norm="batch", skip="pad", init="he"
)


def demo() -> Config:
    """A small U-Net on synthetic pictures, for a first look on any machine.

    python experiments/train.py

    It takes about a minute on two cores and gives a validation Dice of 0.942, IoU 0.893
    (experiments/results/demo.json).
    """
    return Config(
        data=DataConfig(name="synthetic", image_size=96),
        model=ModelConfig(width=8, depth=4, init="he"),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", warmup_fraction=1 / 12
        ),
        train=TrainConfig(epochs=5, batch_size=8, eval_batch_size=8, loss="bce_dice"),
    )


def reference() -> Config:
    """The PyTorch reference design, to the letter, on ISIC 2018.

    python experiments/train.py reference --data.dir ISIC2018

    The reference reports Dice 0.8494 and IoU 0.7480 on the 100 official validation images. One
    NVIDIA H100 took 88 s for 2,000 pairs and gave on 100 others 0.826 and 0.720 by the same
    protocol, PyTorch 0.831 and 0.727 (experiments/results/gpu-reproduction-seed0.json).
    """
    return Config(
        data=DataConfig(name="isic2018", image_size=256),
        model=ModelConfig(),
        optimizer=OptimizerConfig(),
        train=TrainConfig(),
    )


def narrow() -> Config:
    """The reference design at a quarter of its width and half its size, for a CPU.

    python experiments/train.py narrow --data.dir ISIC2018

    2,000 pairs gave a validation Dice of 0.857, IoU 0.769
    (experiments/results/isic2018-narrow.json; one seed).
    """
    return Config(
        data=DataConfig(name="isic2018", image_size=128),
        model=ModelConfig(width=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=100),
        train=TrainConfig(epochs=8, loss="bce_dice"),
    )


def laptop() -> Config:
    """A pretrained encoder and a small decoder, for two cores and a quarter of an hour.

    python -m pip install -e '.[pretrained]'
    python experiments/train.py laptop --data.dir ISIC2018

    2,000 pairs took 11 min 22 s on two cores of an AMD EPYC (AVX2), with preparation and
    compilation, and gave a validation Dice of 0.902, IoU 0.833, threshold Jaccard 0.784
    (experiments/results/isic2018-laptop.json; one seed).
    """
    return Config(
        data=DataConfig(name="isic2018", image_size=128, cache="host"),
        model=_PRETRAINED,
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-3, schedule="cosine", warmup_fraction=0.04
        ),
        train=TrainConfig(epochs=6, loss="bce_dice", augment="standard"),
    )


def best() -> Config:
    """The same with more of everything, for one GPU: a larger encoder, pictures of 384 px,
    strong augmentation, averaged weights.

    python -m pip install -e '.[cuda,pretrained]'
    python experiments/train.py best --data.dir ISIC2018
    python experiments/evaluate.py runs/best --split test --views d4 --data.dir ISIC2018

    It is made for at most 10 minutes on an NVIDIA H100 and for a validation Dice of 0.91. It
    has not been run: no card was to be had.
    """
    return Config(
        data=DataConfig(name="isic2018", image_size=384, cache="host"),
        model=replace(
            _PRETRAINED, encoder="efficientnet_lite2", decoder_width=32, dtype="bfloat16"
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_fraction=0.05,
            ema_decay=0.995,
        ),
        train=TrainConfig(epochs=20, batch_size=16, loss="bce_dice", augment="strong"),
    )


def own() -> Config:
    """A U-Net for your own pictures, from a dozen to thousands, on any machine.

    python experiments/train.py own --data.dir PICTURES --out runs/mine

    Group norm does not mind small batches, and the warm-up is a share of the run, however
    short it is. On a GPU, double --data.image-size and --model.width.
    """
    return Config(
        # To be replaced by --data.dir; a folder must have one.
        data=DataConfig(name="folder", dir=Path("PICTURES"), image_size=128),
        model=ModelConfig(width=16, norm="group", init="he", skip="pad"),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-3, schedule="cosine", warmup_fraction=0.1
        ),
        train=TrainConfig(epochs=20, loss="bce_dice"),
    )


PRESETS = {
    "demo": demo,
    "laptop": laptop,
    "best": best,
    "own": own,
    "narrow": narrow,
    "reference": reference,
}
