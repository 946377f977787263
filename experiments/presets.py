"""Named configurations. Each docstring holds the command, the time and the score to expect."""

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def demo() -> Config:
    """A small U-Net on synthetic pictures, for a first look on any machine.

    python experiments/train.py
    """
    return Config(
        data=DataConfig(name="synthetic", image_size=96),
        model=ModelConfig(width=8, depth=4, init="he"),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=20),
        train=TrainConfig(epochs=5, batch_size=8, eval_batch_size=8, loss="bce_dice"),
    )


def reference() -> Config:
    """The PyTorch reference design, to the letter, on ISIC 2018.

    python experiments/train.py reference --data.dir ISIC2018

    The reference reports Dice 0.8494 and IoU 0.7480 on the 100 official validation images.
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
    """
    return Config(
        data=DataConfig(name="isic2018", image_size=128),
        model=ModelConfig(width=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=100),
        train=TrainConfig(epochs=8, loss="bce_dice"),
    )


PRESETS = {"demo": demo, "narrow": narrow, "reference": reference}
