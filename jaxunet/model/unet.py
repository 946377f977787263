"""The U-Net (Ronneberger et al. 2015, arXiv:1505.04597), with padded convolutions.

`make_unet(config)` gives the Linen module. Its variables are named

    params/encoder/level_0..N-1/conv_0|conv_1/kernel|bias
    params/decoder/level_N-2..0/up/kernel|bias                 (transposed upsampling only)
    params/decoder/level_N-2..0/conv_0|conv_1/kernel|bias
    params/head/kernel|bias
    params/.../norm_0|norm_1/scale|bias                        (with a norm)
    batch_stats/.../norm_0|norm_1/mean|var                     (batch norm only)

where level 0 is the finest. Kernels are `[height, width, in, out]`, images NHWC.

An encoder gives a list of feature maps from fine to coarse; the decoder takes such a list.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.conv import conv3x3, conv3x3_joined
from jaxunet.model.layers import conv1x1, max_pool2x2, relu
from jaxunet.model.normalization import BatchNorm
from jaxunet.model.up_conv import up_conv2x2

Features = Float[Array, "batch height width channels"]
Initializer = Any  # (key, shape, dtype) -> array, as in jax.nn.initializers


def _uniform(bound: float) -> Initializer:
    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _initializers(scheme: str, fan_in: int) -> tuple[Initializer, Initializer]:
    """Kernel and bias initialisers.

    `pytorch` is `torch.nn.Conv2d.reset_parameters`: both uniform in ±1/sqrt(fan_in).
    `he` is He et al. 2015 (arXiv:1502.01852): normal of variance 2/fan_in, zero bias.
    """
    if scheme == "pytorch":
        return _uniform(fan_in**-0.5), _uniform(fan_in**-0.5)
    return nn.initializers.normal((2 / fan_in) ** 0.5), nn.initializers.zeros


def center_crop(
    x: Features, height: int, width: int
) -> Float[Array, "batch {height} {width} channels"]:
    """The middle `height` x `width` of `x`; an odd remainder is cut from the far side."""
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def center_pad(
    x: Features, height: int, width: int
) -> Float[Array, "batch {height} {width} channels"]:
    """`x` in the middle of a zero `height` x `width`; an odd remainder goes to the far side."""
    missing = height - x.shape[1], width - x.shape[2]
    around = [(count // 2, count - count // 2) for count in missing]
    return jnp.pad(x, ((0, 0), *around, (0, 0)))


def upsample_bilinear(x: Features) -> Float[Array, "batch 2*height 2*width channels"]:
    """Twice the size, bilinear with aligned corners (`torch.nn.Upsample(align_corners=True)`).

    Interpolation is linear along each axis, so it is one small matrix product per axis.
    """

    def matrix(size: int) -> Array:
        position = jnp.arange(2.0 * size) * ((size - 1) / (2 * size - 1))
        distance = jnp.abs(position[:, None] - jnp.arange(1.0 * size)[None, :])
        return jnp.maximum(0, 1 - distance).astype(x.dtype)

    rows, columns = matrix(x.shape[1]), matrix(x.shape[2])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)


def _for_pixels(bias: Float[Array, " channels"], dtype: Any) -> Float[Array, "1 1 1 channels"]:
    """Of the rank of a map, which `jax_numpy_rank_promotion` may demand."""
    return bias.astype(dtype)[None, None, None]


class Conv(nn.Module):
    """3x3 convolution of an image, or of two joined along their channels; size kept."""

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, *parts: Features) -> Float[Array, "batch height width features"]:
        channels, dtype = sum(x.shape[-1] for x in parts), parts[0].dtype
        kernel_init, bias_init = _initializers(self.config.init, 9 * channels)
        kernel = self.param("kernel", kernel_init, (3, 3, channels, self.features))
        kernel = kernel.astype(dtype)
        y = conv3x3_joined(*parts, kernel) if parts[1:] else conv3x3(parts[0], kernel)
        if self.config.conv_bias:
            y += _for_pixels(self.param("bias", bias_init, (self.features,)), dtype)
        return y


class UpConv(nn.Module):
    """2x2 transposed convolution of stride 2: twice the size."""

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch rows columns features"]:
        # PyTorch takes a transposed convolution's fan-in from its output channels.
        kernel_init, bias_init = _initializers(self.config.init, 4 * self.features)
        kernel = self.param("kernel", kernel_init, (2, 2, x.shape[-1], self.features))
        bias = self.param("bias", bias_init, (self.features,))
        return up_conv2x2(x, kernel.astype(x.dtype)) + _for_pixels(bias, x.dtype)


def double_conv(
    config: ModelConfig,
    axis_name: str | None,
    parts: Sequence[Features],
    weight: Bool[Array, " batch"],
    *,
    middle: int,
    features: int,
    train: bool,
) -> Float[Array, "batch height width {features}"]:
    """Twice convolution, normalisation, ReLU; called inside a level's compact method."""
    for i, width in enumerate((middle, features)):
        x = Conv(config, width, name=f"conv_{i}")(*parts)
        if config.norm == "batch":
            x = BatchNorm(axis_name, name=f"norm_{i}")(x, weight, train=train)
        elif config.norm == "group":
            groups = min(8, config.width)
            norm = nn.GroupNorm(groups, epsilon=1e-5, dtype=jnp.float32, name=f"norm_{i}")
            x = norm(x.astype(jnp.float32)).astype(x.dtype)
        parts = [relu(x)]
    return parts[0]


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


class DecoderLevel(nn.Module):
    """One level up: enlarge, join with the skip, convolve."""

    config: ModelConfig
    features: int
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Features,
        skip: Float[Array, "batch rows columns skip_channels"],
        weight: Bool[Array, " batch"],
    ) -> Float[Array, "batch new_height new_width features"]:
        middle = skip.shape[-1]
        if self.config.upsampling == "transposed":
            x = UpConv(self.config, middle, name="up")(x)
        else:
            x = upsample_bilinear(x)
        if self.config.skip == "crop":
            skip = center_crop(skip, x.shape[1], x.shape[2])
        else:
            x = center_pad(x, skip.shape[1], skip.shape[2])
        pair = [x, skip] if self.config.concat == "upsampled_first" else [skip, x]
        return double_conv(
            self.config,
            self.axis_name,
            pair,
            weight,
            middle=middle,
            features=self.features,
            train=self.train,
        )


class Encoder(nn.Module):
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


class Decoder(nn.Module):
    """From feature maps, fine to coarse, to one map at the finest scale."""

    config: ModelConfig
    axis_name: str | None
    train: bool

    @nn.compact
    def __call__(
        self, maps: list[Float[Array, "batch _ _ _"]], weight: Bool[Array, " batch"]
    ) -> Float[Array, "batch _ _ _"]:
        level_type = nn.remat(DecoderLevel) if self.config.remat else DecoderLevel
        *skips, x = maps
        for level in reversed(range(len(skips))):
            features = skips[level].shape[-1]
            if self.config.upsampling == "bilinear" and level:
                features //= 2  # what the next level up expects without a learnt upsampling
            x = level_type(
                self.config, features, self.axis_name, self.train, name=f"level_{level}"
            )(x, skips[level], weight)
        return x


class Head(nn.Module):
    """1x1 convolution to logits, in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch height width logits"]:
        kernel_init, bias_init = _initializers(self.config.init, x.shape[-1])
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.config.num_logits))
        bias = self.param("bias", bias_init, (self.config.num_logits,))
        return conv1x1(x, kernel.astype(x.dtype)) + _for_pixels(bias, jnp.float32)


class UNet(nn.Module):
    """Encoder, decoder with skip connections, and a 1x1 head.

    Attributes:
        config: shape of the network.
        axis_name: mapped axis over which batch norm gathers its statistics, if any.
    """

    config: ModelConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        weight: Bool[Array, " batch"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch rows columns logits"]:
        """Logits, float32.

        Args:
            images: normalised images of at least `config.least_image_size` pixels a side.
            weight: False marks padding examples, which batch norm then leaves out.
            train: whether batch norm uses and updates the batch's statistics.

        Returns:
            One or two logits a pixel. With `skip="crop"` and sides that the poolings do
            not divide, the map is smaller than the input (572 gives 560).
        """
        if weight is None:
            weight = jnp.ones(images.shape[0], bool)
        x = images.astype(self.config.dtype)
        maps = Encoder(self.config, self.axis_name, train, name="encoder")(x, weight)
        x = Decoder(self.config, self.axis_name, train, name="decoder")(maps, weight)
        return Head(self.config, name="head")(x)


def make_unet(config: ModelConfig, axis_name: str | None = None) -> UNet:
    """The U-Net that `config` describes, a Linen module.

    >>> model = jaxunet.make_unet(jaxunet.ModelConfig(width=16))
    """
    return UNet(config, axis_name)


def count_parameters(params: Any) -> int:
    """Number of trainable scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
