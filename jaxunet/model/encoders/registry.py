"""The encoders by name, and what the network around one must know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flax import linen as nn

from jaxunet.config import ModelConfig
from jaxunet.model.encoders.efficientnet_lite import EfficientNetLite
from jaxunet.model.encoders.plain import PlainEncoder
from jaxunet.model.encoders.resnet import ResNet
from jaxunet.model_config import EncoderName

PerChannel = float | tuple[float, ...]


@dataclass(frozen=True)
class Encoder:
    """One of the encoders.

    Attributes:
        make: from the configuration, the mapped axis and whether it trains to the module, which
            is named `encoder`.
        multiple: what the sides of its input must be a multiple of.
        scale, offset: a pixel x of 0 to 255 is to be given as `x * scale - offset`.
    """

    make: Callable[[ModelConfig, str | None, bool], nn.Module]
    multiple: int
    scale: PerChannel
    offset: PerChannel


LITES: dict[EncoderName, tuple[float, float]] = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
"""Factors of channels and of blocks."""

RESNETS: dict[EncoderName, tuple[tuple[int, int, int, int], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
"""Blocks of each stage, and whether they are bottlenecks."""


def _lite(width: float, depth: float) -> Encoder:
    # (x - 127)/128, as TensorFlow's authors trained them.
    make = partial(EfficientNetLite, width=width, depth=depth, name="encoder")
    return Encoder(make, 32, 1 / 128, 127 / 128)


def _resnet(blocks: tuple[int, int, int, int], bottleneck: bool) -> Encoder:
    # ImageNet's means and standard deviations by channel, of pixels from 0 to 1.
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scale = tuple(1 / (255 * each) for each in std)
    offset = tuple(a / b for a, b in zip(mean, std, strict=True))
    make = partial(ResNet, blocks=blocks, bottleneck=bottleneck, name="encoder")
    return Encoder(make, 32, scale, offset)


ENCODERS: dict[EncoderName, Encoder] = {
    # (x/255 - 0.5)/0.5, as in the reference.
    "plain": Encoder(partial(PlainEncoder, name="encoder"), 1, 2 / 255, 1),
    **{name: _lite(*factors) for name, factors in LITES.items()},
    **{name: _resnet(*form) for name, form in RESNETS.items()},
}
