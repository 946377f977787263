"""The layers of pretrained encoders: convolutions without a bias, and their batch norm."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.blocks import Features, initializers
from jaxunet.model.conv import DIMENSIONS
from jaxunet.model.depthwise import Padding
from jaxunet.model.normalization import BatchNorm

Map = Float[Array, "batch _ _ _"]


class Pointwise(nn.Module):
    """1x1 convolution: a product of each pixel with a matrix."""

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch height width features"]:
        kernel_init, _ = initializers(self.config.init, x.shape[-1])
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        return jnp.matmul(x, kernel.astype(x.dtype))


class StridedConv(nn.Module):
    """Convolution of any size and stride."""

    config: ModelConfig
    features: int
    size: int
    stride: int
    padding: Padding

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch rows columns features"]:
        kernel_init, _ = initializers(self.config.init, self.size**2 * x.shape[-1])
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape).astype(x.dtype)
        strides = (self.stride, self.stride)
        return lax.conv_general_dilated(
            x, kernel, strides, self.padding, dimension_numbers=DIMENSIONS
        )


def batch_norm(
    config: ModelConfig, axis_name: str | None, train: bool, epsilon: float, name: str
) -> Callable[[Map, Bool[Array, " batch"]], Map]:
    """`BatchNorm` called `name`; with frozen `encoder_statistics` it never uses a batch's."""
    norm = BatchNorm(axis_name, epsilon=epsilon, name=name)
    return partial(norm, train=train and config.encoder_statistics == "synced")
