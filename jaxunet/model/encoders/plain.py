"""The U-Net's own encoder: two 3x3 convolutions at each scale, a max-pool before the next."""

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.blocks import Features, double_conv
from jaxunet.model.layers import max_pool2x2


class EncoderLevel(nn.Module):
    """Convolve at one scale."""

    config: ModelConfig
    features: int
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(
        self, x: Features, weight: Bool[Array, " batch"]
    ) -> Float[Array, "batch height width features"]:
        return double_conv(
            self.config,
            self.axis_name,
            [x],
            weight,
            middle=self.features,
            features=self.features,
            train=self.train,
        )


class PlainEncoder(nn.Module):
    """Feature maps from fine to coarse, each level half the size of the one before."""

    config: ModelConfig
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(
        self, x: Features, weight: Bool[Array, " batch"]
    ) -> list[Float[Array, "batch _ _ _"]]:
        level_type = nn.remat(EncoderLevel) if self.config.remat else EncoderLevel
        maps = []
        for level in range(self.config.depth):
            features = self.config.width * 2**level
            if self.config.upsampling == "bilinear" and level == self.config.depth - 1:
                features //= 2
            x = max_pool2x2(x) if level else x
            x = level_type(
                self.config, features, self.axis_name, self.train, name=f"level_{level}"
            )(x, weight)
            maps.append(x)
        return maps
