"""EfficientNet-Lite: EfficientNets (Tan and Le 2019, arXiv:1905.11946) without squeeze and
excitation, and with ReLU6.

As TensorFlow's authors made them, from whom the weights come
(github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite): padding as
TensorFlow's `SAME`, batch norm's epsilon 1e-3. timm calls them `tf_efficientnet_lite0` and so
on. Variables are named

    params/encoder/stem/kernel
    params/encoder/stage_0..6_block_0..N-1/expand|depthwise|project/kernel
    params/encoder/.../expand_norm|depthwise_norm|project_norm/scale|bias

(`stem_norm` beside the stem); the first stage has no `expand`. What comes after the last stage
for classification is left out.
"""

import math
from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.blocks import Features, initializers
from jaxunet.model.depthwise import Padding, depthwise_conv
from jaxunet.model.encoders.layers import Map, Pointwise, StridedConv, batch_norm
from jaxunet.model.layers import relu6

EPSILON = 1e-3

# Kernel, stride, factor of expansion, channels, blocks; before they are scaled.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM = 32
MAPS = (0, 1, 2, 4, 6)
"""The stages after which a map is given: the last of their size."""


def same_padding(sides: Sequence[int], size: int, stride: int) -> Padding:
    """TensorFlow's `SAME`: an odd zero goes to the far side."""

    def around(side: int) -> tuple[int, int]:
        missing = max((-(-side // stride) - 1) * stride + size - side, 0)
        return missing // 2, missing - missing // 2

    return around(sides[0]), around(sides[1])


def scaled(channels: int, factor: float) -> int:
    """Channels times `factor`, to a near multiple of 8 that is no less than nine tenths."""
    near = max(8, int(channels * factor + 4) // 8 * 8)
    return near if near >= 0.9 * channels * factor else near + 8


def stages(width: float, depth: float) -> list[tuple[int, int, int, int, int]]:
    """`STAGES` with channels and blocks scaled; first and last stage keep their one block."""
    last = len(STAGES) - 1
    return [
        (*stage[:3], scaled(stage[3], width), blocks)
        for number, stage in enumerate(STAGES)
        for blocks in [stage[4] if number in (0, last) else math.ceil(stage[4] * depth)]
    ]


class Depthwise(nn.Module):
    """Depthwise convolution without a bias, padded as `SAME`."""

    config: ModelConfig
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch rows columns channels"]:
        kernel_init, _ = initializers(self.config.init, self.size**2)
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", kernel_init, shape).astype(x.dtype)
        padding = same_padding(x.shape[1:3], self.size, self.stride)
        return depthwise_conv(x, kernel, self.stride, padding)


class Block(nn.Module):
    """Expand channels, convolve each, project; added to the input where the shapes agree."""

    config: ModelConfig
    size: int
    stride: int
    expansion: int
    features: int
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(
        self, x: Features, weight: Bool[Array, " batch"]
    ) -> Float[Array, "batch rows columns features"]:
        def norm(name: str, x: Map) -> Map:
            arguments = self.config, self.axis_name, self.train, EPSILON, f"{name}_norm"
            return batch_norm(*arguments)(x, weight)

        channels, y = x.shape[-1], x
        if self.expansion > 1:
            expand = Pointwise(self.config, self.expansion * channels, name="expand")
            y = relu6(norm("expand", expand(y)))
        depthwise = Depthwise(self.config, self.size, self.stride, name="depthwise")
        y = relu6(norm("depthwise", depthwise(y)))
        y = norm("project", Pointwise(self.config, self.features, name="project")(y))
        return x + y if y.shape == x.shape else y


class EfficientNetLite(nn.Module):
    """Maps of strides 2, 4, 8, 16 and 32 behind None for stride 1.

    Attributes:
        width, depth: factors of channels and of blocks.
    """

    config: ModelConfig
    axis_name: str | None
    train: bool
    width: float
    depth: float

    @nn.compact
    def __call__(self, x: Features, weight: Bool[Array, " batch"]) -> list[Map | None]:
        padding = same_padding(x.shape[1:3], 3, 2)
        x = StridedConv(self.config, STEM, 3, 2, padding, name="stem")(x)
        norm = batch_norm(self.config, self.axis_name, self.train, EPSILON, "stem_norm")
        x = relu6(norm(x, weight))
        block_type = nn.remat(Block) if self.config.remat else Block
        maps: list[Map | None] = [None]
        for number, stage in enumerate(stages(self.width, self.depth)):
            size, stride, expansion, features, blocks = stage
            for i in range(blocks):
                x = block_type(
                    self.config,
                    size,
                    1 if i else stride,
                    expansion,
                    features,
                    self.axis_name,
                    self.train,
                    name=f"stage_{number}_block_{i}",
                )(x, weight)
            if number in MAPS:
                maps.append(x)
        return maps
