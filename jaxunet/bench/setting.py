"""What is timed: a point of the sweep, and how, against what, for how long."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxunet.config import Config, ModelConfig

Measure = Literal[
    "train",
    "eval",
    "predict",
    "augmentation",
    "pipeline",
    "training",
    "preparation",
    "layers",
]
Form = Literal["compile_channels_last", "channels_last", "graphs", "compile", "eager"]
FORMS: tuple[Form, ...] = get_args(Form)
"""PyTorch's, the most telling first."""


@dataclass(frozen=True)
class Timing:
    """What is timed, against what, and for how long."""

    measure: tuple[Measure, ...] = ("train", "eval", "predict", "pipeline", "training")
    """What to time: three kinds of step on a batch that lies on the devices; `augmentation`,
    what each --train.augment does before the train step; the input
    `pipeline` alone; `training` end to end, under each --data.cache; `preparation` of data:
    decoding and resizing of large JPEGs; `layers`: every 3x3 convolution and its gradients."""
    against: Literal["nothing", "pytorch"] = "nothing"
    """Time PyTorch's steps too, each form in turn with jaxunet's."""
    forms: tuple[Form, ...] = FORMS
    """PyTorch's forms, in this order: `torch.compile`, channels last, both, neither (`eager`),
    and both with CUDA graphs (`graphs`, on a GPU only)."""
    tf32: bool = True
    """Whether float32 products may be rounded to TF32 on an NVIDIA GPU, in both frameworks."""
    rounds: int = 12
    """Timed rounds of each contestant."""
    seconds: float = 1.0
    """Length of a round."""


def network_of(model: ModelConfig) -> str:
    """In a few words which network is timed."""
    if model.encoder == "plain":
        return f"width {model.width}"
    return f"{model.encoder}, decoder {model.decoder_width}"


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    config: Config
    parallel: Literal["pmap", "jit"]
    devices: int

    def record(self) -> dict[str, Any]:
        return {
            "network": network_of(self.config.model),
            "batch_size": self.config.train.batch_size,
            "image_size": self.config.data.image_size,
            "width": self.config.model.width,
            "dtype": self.config.model.dtype,
            "remat": self.config.model.remat,
            "parallel": self.parallel,
            "devices": self.devices,
        }
