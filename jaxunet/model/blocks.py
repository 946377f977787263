"""What encoders and the decoder are made of: convolutions with their parameters.

Kernels are `[height, width, in, out]`, images NHWC.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.conv import conv3x3, conv3x3_joined
from jaxunet.model.layers import relu
from jaxunet.model.normalization import BatchNorm
from jaxunet.model.up_conv import up_conv2x2

Features = Float[Array, "batch height width channels"]
Part = Float[Array, "batch height width _"]
Initializer = Any  # (key, shape, dtype) -> array, as in jax.nn.initializers


def _uniform(bound: float) -> Initializer:
    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def initializers(scheme: str, fan_in: int) -> tuple[Initializer, Initializer]:
    """Kernel and bias initialisers.

    `pytorch` is `torch.nn.Conv2d.reset_parameters`: both uniform in ±1/sqrt(fan_in).
    `he` is He et al. 2015 (arXiv:1502.01852): normal of variance 2/fan_in, zero bias.
    """
    if scheme == "pytorch":
        return _uniform(fan_in**-0.5), _uniform(fan_in**-0.5)
    return nn.initializers.normal((2 / fan_in) ** 0.5), nn.initializers.zeros


def for_pixels(bias: Float[Array, " channels"], dtype: Any) -> Float[Array, "1 1 1 channels"]:
    """Of the rank of a map, which `jax_numpy_rank_promotion` may demand."""
    return bias.astype(dtype)[None, None, None]


class Conv(nn.Module):
    """3x3 convolution of an image, or of two joined along their channels; size kept."""

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, *parts: Part) -> Float[Array, "batch height width features"]:
        channels, dtype = sum(x.shape[-1] for x in parts), parts[0].dtype
        kernel_init, bias_init = initializers(self.config.init, 9 * channels)
        kernel = self.param("kernel", kernel_init, (3, 3, channels, self.features))
        kernel = kernel.astype(dtype)
        y = conv3x3_joined(*parts, kernel) if parts[1:] else conv3x3(parts[0], kernel)
        if self.config.conv_bias:
            y += for_pixels(self.param("bias", bias_init, (self.features,)), dtype)
        return y


class UpConv(nn.Module):
    """2x2 transposed convolution of stride 2: twice the size."""

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch rows columns features"]:
        # PyTorch takes a transposed convolution's fan-in from its output channels.
        kernel_init, bias_init = initializers(self.config.init, 4 * self.features)
        kernel = self.param("kernel", kernel_init, (2, 2, x.shape[-1], self.features))
        bias = self.param("bias", bias_init, (self.features,))
        return up_conv2x2(x, kernel.astype(x.dtype)) + for_pixels(bias, x.dtype)


def double_conv(
    config: ModelConfig,
    axis_name: str | None,
    parts: Sequence[Part],
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
            groups = config.norm_groups
            norm = nn.GroupNorm(groups, epsilon=1e-5, dtype=jnp.float32, name=f"norm_{i}")
            x = norm(x.astype(jnp.float32)).astype(x.dtype)
        parts = [relu(x)]
    return parts[0]
