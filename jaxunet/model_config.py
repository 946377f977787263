"""The shape of the network, a part of `jaxunet.config.Config`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxunet.ranges import require, require_at_least

EncoderName = Literal[
    "plain",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "resnet18",
    "resnet34",
    "resnet50",
]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the U-Net."""

    width: int = 64
    """Channels at the first level; doubled at each level below. Of the plain encoder alone:
    others have channels of their own, and `decoder_width`."""
    depth: int = 5
    """Number of levels, the bottom one included. Of the plain encoder alone."""
    num_logits: int = 1
    """Output channels: 1 (lesion) or 2 (background and lesion)."""
    norm: Literal["none", "batch", "group"] = "none"
    """Normalisation after each convolution; `batch` is synced across devices."""
    upsampling: Literal["transposed", "bilinear"] = "transposed"
    """2x2 transposed convolution, or bilinear interpolation with halved channels."""
    skip: Literal["crop", "pad"] = "crop"
    """Where sizes differ: centre-crop the skip (the reference), or zero-pad the
    upsampled map (milesial/Pytorch-UNet; the output keeps the input's size)."""
    concat: Literal["upsampled_first", "skip_first"] = "upsampled_first"
    """Order of concatenation: `[upsampled, skip]` (the reference) or `[skip, upsampled]`."""
    conv_bias: bool = True
    """Whether the 3x3 convolutions have a bias."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and logits stay float32."""
    init: Literal["pytorch", "he"] = "pytorch"
    """Initial weights: PyTorch's default (uniform in ±1/sqrt(fan_in)) or He normal."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    encoder: EncoderName = "plain"
    """What gives the decoder its feature maps. Each has its parameters, the GFLOPs of a picture
    of 256 px, and where `imagenet` weights come from.
    plain: 18.8 M, 34.0; none. The U-Net's own, of `width` and `depth`, here the default ones.
    efficientnet_lite0: 3.0 M, 1.0; the extra `[pretrained]`.
    efficientnet_lite1: 3.7 M, 1.3; the same.
    efficientnet_lite2: 4.4 M, 1.4; the same.
    resnet18: 11.2 M, 4.7; timm's repository, by huggingface_hub and the network.
    resnet34: 21.3 M, 9.6; the same.
    resnet50: 23.5 M, 10.7; the same."""
    weights: Literal["none", "imagenet"] | Path = "none"
    """What the encoder starts from: `none` (drawn by `init`), `imagenet`, or a .pth or
    .safetensors file in the names of timm or of torchvision. The plain one has none: see
    `experiments/import_pytorch.py`."""
    encoder_statistics: Literal["synced", "frozen"] = "synced"
    """Batch norm inside an encoder: of the whole batch, synced across devices, or frozen at
    the statistics that came with the weights. The plain one has `norm`, as the decoder."""
    decoder_width: int = 16
    """Channels of the decoder's finest level, doubled at each level below; with the plain
    encoder they are the encoder's own."""

    def __post_init__(self) -> None:
        require_at_least("model.decoder_width", self.decoder_width, 1)
        require(
            self.weights == "none" or self.encoder != "plain",
            "model.weights",
            str(self.weights),
            "'none' with model.encoder 'plain'; a U-Net's weights are taken by "
            "experiments/import_pytorch.py",
        )
        require(
            self.encoder_statistics == "synced" or self.weights != "none",
            "model.encoder_statistics",
            self.encoder_statistics,
            "'synced' without model.weights, which bring statistics",
        )
        require_at_least("model.width", self.width, 1)
        require_at_least("model.depth", self.depth, 2)
        require(self.num_logits in (1, 2), "model.num_logits", self.num_logits, "1 or 2")
        require(
            self.norm != "group" or self.finest_width % self.norm_groups == 0,
            "model.width" if self.encoder == "plain" else "model.decoder_width",
            self.finest_width,
            "a multiple of 8 (or below 8) with model.norm 'group'",
        )
        require(
            self.upsampling != "bilinear" or self.encoder != "plain" or self.width % 2 == 0,
            "model.width",
            self.width,
            "even with model.upsampling 'bilinear', which halves channels",
        )

    @property
    def finest_width(self) -> int:
        """Channels of the decoder's finest level."""
        return self.width if self.encoder == "plain" else self.decoder_width

    @property
    def norm_groups(self) -> int:
        """Groups of channels that `norm` `group` normalises together."""
        return min(8, self.finest_width)

    @property
    def least_image_size(self) -> int:
        """Smallest image side in pixels that survives all the poolings."""
        return 2 ** (self.depth - 1) if self.encoder == "plain" else 1
