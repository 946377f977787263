"""The U-Net's decoder: from feature maps, fine to coarse, to one map at the finest scale."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.blocks import Features, UpConv, double_conv
from jaxunet.model.resizing import center_crop, center_pad, upsample_bilinear

Map = Float[Array, "batch _ _ _"]


class DecoderLevel(nn.Module):
    """One level up: enlarge, join with the skip if there is one, convolve."""

    config: ModelConfig
    middle: int
    features: int
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Features,
        skip: Float[Array, "batch rows columns skip_channels"] | None,
        weight: Bool[Array, " batch"],
    ) -> Float[Array, "batch new_height new_width features"]:
        if self.config.upsampling == "transposed":
            x = UpConv(self.config, self.middle, name="up")(x)
        else:
            x = upsample_bilinear(x)
        parts = [x] if skip is None else self._beside(x, skip)
        return double_conv(
            self.config,
            self.axis_name,
            parts,
            weight,
            middle=self.middle,
            features=self.features,
            train=self.train,
        )

    def _beside(self, x: Map, skip: Map) -> list[Map]:
        """Both at one size, in the order in which they are joined."""
        if self.config.skip == "crop":
            skip = center_crop(skip, x.shape[1], x.shape[2])
        else:
            x = center_pad(x, skip.shape[1], skip.shape[2])
        return [x, skip] if self.config.concat == "upsampled_first" else [skip, x]


class Decoder(nn.Module):
    """Level by level up from the coarsest of an encoder's feature maps."""

    config: ModelConfig
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(self, maps: list[Map | None], weight: Bool[Array, " batch"]) -> Map:
        """The map at the finest scale.

        Args:
            maps: one of each scale from fine to coarse, each half the size of the one before;
                None for a scale at which the encoder has none.
        """
        level_type = nn.remat(DecoderLevel) if self.config.remat else DecoderLevel
        *skips, x = maps
        assert x is not None
        for level in reversed(range(len(skips))):
            middle, features = self._channels(level, skips[level])
            x = level_type(
                self.config, middle, features, self.axis_name, self.train, name=f"level_{level}"
            )(x, skips[level], weight)
        return x

    def _channels(self, level: int, skip: Map | None) -> tuple[int, int]:
        """What a level's first and its second convolution give."""
        if self.config.encoder != "plain":
            return (self.config.decoder_width * 2**level,) * 2
        assert skip is not None
        channels = int(jnp.shape(skip)[-1])
        if self.config.upsampling == "bilinear" and level:
            # What the next level up expects without a learnt upsampling.
            return channels, channels // 2
        return channels, channels
