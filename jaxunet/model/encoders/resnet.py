"""ResNets (He et al. 2016, arXiv:1512.03385), as torchvision and timm have them.

The stride of a bottleneck is in its 3x3 convolution. Variables are named

    params/encoder/stem/kernel
    params/encoder/stage_0..3_block_0..N-1/conv_0|conv_1|conv_2|shortcut/kernel
    params/encoder/.../norm_0|norm_1|norm_2|shortcut_norm/scale|bias

(`stem_norm` beside the stem); `conv_2` is of bottlenecks only.
"""

from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.blocks import Features
from jaxunet.model.encoders.layers import Map, Pointwise, StridedConv, batch_norm
from jaxunet.model.layers import relu
from jaxunet.model.pooling import max_pool3x3

EPSILON = 1e-5
CHANNELS = (64, 128, 256, 512)
WIDENING = 4
"""How many times the channels of its 3x3 convolution a bottleneck gives."""


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck, added to the input or to its projection."""

    config: ModelConfig
    channels: int
    stride: int
    bottleneck: bool
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(
        self, x: Features, weight: Bool[Array, " batch"]
    ) -> Float[Array, "batch rows columns features"]:
        def norm(name: str, x: Map) -> Map:
            return batch_norm(self.config, self.axis_name, self.train, EPSILON, name)(x, weight)

        def conv3x3(number: int, stride: int, x: Map) -> Map:
            conv = StridedConv(
                self.config, self.channels, 3, stride, ((1, 1), (1, 1)), name=f"conv_{number}"
            )
            return norm(f"norm_{number}", conv(x))

        def conv1x1(name: str, norm_name: str, features: int, x: Map) -> Map:
            return norm(norm_name, Pointwise(self.config, features, name=name)(x))

        features = self.channels * WIDENING if self.bottleneck else self.channels
        if self.bottleneck:
            y = relu(conv1x1("conv_0", "norm_0", self.channels, x))
            y = conv1x1("conv_2", "norm_2", features, relu(conv3x3(1, self.stride, y)))
        else:
            y = conv3x3(1, 1, relu(conv3x3(0, self.stride, x)))
        if self.stride > 1 or x.shape[-1] != features:
            strided = lax.slice(x, (0,) * 4, x.shape, (1, self.stride, self.stride, 1))
            x = conv1x1("shortcut", "shortcut_norm", features, strided)
        return relu(x + y)


class ResNet(nn.Module):
    """Maps of strides 2, 4, 8, 16 and 32 behind None for stride 1.

    Attributes:
        blocks: of each of the four stages.
    """

    config: ModelConfig
    axis_name: str | None
    train: bool
    blocks: tuple[int, int, int, int]
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Features, weight: Bool[Array, " batch"]) -> list[Map | None]:
        stem = StridedConv(self.config, CHANNELS[0], 7, 2, ((3, 3), (3, 3)), name="stem")
        norm = batch_norm(self.config, self.axis_name, self.train, EPSILON, "stem_norm")
        x = relu(norm(stem(x), weight))
        maps: list[Map | None] = [None, x]
        x = max_pool3x3(x)
        block_type = nn.remat(Block) if self.config.remat else Block
        for stage, (channels, blocks) in enumerate(zip(CHANNELS, self.blocks, strict=True)):
            for i in range(blocks):
                x = block_type(
                    self.config,
                    channels,
                    1 if i or not stage else 2,
                    self.bottleneck,
                    self.axis_name,
                    self.train,
                    name=f"stage_{stage}_block_{i}",
                )(x, weight)
            maps.append(x)
        return maps
