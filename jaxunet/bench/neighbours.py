"""How fast others say that their U-Nets train, and our setting that is nearest to theirs."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxunet.bench.setting import Setting
from jaxunet.config import Config, DataConfig, ModelConfig, TrainConfig


@dataclass(frozen=True)
class Neighbour:
    """A published figure of a train step.

    Attributes:
        images_per_second: by our compute type that is nearest to theirs.
        batch_size, image_size, model: of the setting that it is of, as ours gets it.
        gflops_per_image: 10^9 operations of their forward pass, counted as `bench.flops` does.
        differs: what keeps the two figures from being one and the same race.
    """

    name: str
    source: str
    device: str
    images_per_second: dict[str, float]
    batch_size: int
    image_size: int
    model: ModelConfig
    gflops_per_image: float
    differs: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What a result holds of it."""
        return asdict(self)

    def beside(self, setting: Setting) -> float | None:
        """Its images a second, if `setting` is the one it is near, on one device."""
        config, dtype = setting.config, setting.config.model.dtype
        ours = config.train.batch_size, config.data.image_size, config.model, setting.devices
        theirs = self.batch_size, self.image_size, replace(self.model, dtype=dtype), 1
        return self.images_per_second.get(dtype) if ours == theirs else None


NVIDIA = Neighbour(
    name="NVIDIA's U-Net",
    source="NVIDIA/DeepLearningExamples, TensorFlow2/Segmentation/UNet_Medical, README:"
    " training performance of one GPU at batch 8 (its edition of 2020, of a 40 GB A100, has 119"
    " and 46)",
    device="NVIDIA A100",
    images_per_second={"bfloat16": 141, "float32": 63},
    batch_size=8,
    image_size=576,
    model=ModelConfig(num_logits=2),
    gflops_per_image=314.9,
    differs=(
        "theirs is not padded: 572 px become 388; ours stays at 576, 1.5 times the operations",
        "theirs goes up by 3x3 transposed convolutions with ReLU, ours by 2x2 without",
        "theirs takes 1 channel and has dropout of 0.5 at the bottom, ours 3 and none",
        "theirs computes in float16 with a scaled loss where ours does in bfloat16",
        "theirs is timed with its input pipeline and augmentation, ours without",
    ),
)


def nvidia() -> Config:
    """The setting near `NVIDIA`: its two logits and its loss, Dice and cross-entropy."""
    batch, side = NVIDIA.batch_size, NVIDIA.image_size
    return Config(
        data=DataConfig(image_size=side, synthetic_train=64, synthetic_validation=8),
        model=NVIDIA.model,
        train=TrainConfig(
            batch_size=batch, eval_batch_size=batch, loss="bce_dice", augment="none"
        ),
    )


NEIGHBOURS = {"nvidia": (nvidia, NVIDIA)}
"""By the name of the preset of `experiments/benchmark.py`."""
