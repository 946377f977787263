"""The U-Net (Ronneberger et al. 2015, arXiv:1505.04597), with padded convolutions.

`make_unet(config)` gives the Linen module. Its variables are named

    params/encoder/level_0..N-1/conv_0|conv_1/kernel|bias      (of the plain encoder)
    params/decoder/level_N-2..0/up/kernel|bias                 (transposed upsampling only)
    params/decoder/level_N-2..0/conv_0|conv_1/kernel|bias
    params/head/kernel|bias
    params/.../norm_0|norm_1/scale|bias                        (with a norm)
    batch_stats/.../norm_0|norm_1/mean|var                     (batch norm only)

where level 0 is the finest. Kernels are `[height, width, in, out]`, images NHWC. Those of other
encoders are named in `jaxunet.model.encoders`.

An encoder gives a list of feature maps from fine to coarse; the decoder takes such a list.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxunet.config import ModelConfig
from jaxunet.model.blocks import Features, for_pixels, initializers
from jaxunet.model.decoder import Decoder
from jaxunet.model.encoders.registry import ENCODERS
from jaxunet.model.layers import conv1x1
from jaxunet.model.resizing import center_crop, center_pad


class Head(nn.Module):
    """1x1 convolution to logits, in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch height width logits"]:
        kernel_init, bias_init = initializers(self.config.init, x.shape[-1])
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.config.num_logits))
        bias = self.param("bias", bias_init, (self.config.num_logits,))
        return conv1x1(x, kernel.astype(x.dtype)) + for_pixels(bias, jnp.float32)


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
            images: normalised images. For the plain encoder of at least
                `config.least_image_size` pixels a side; for others of any size: they are
                padded with zeros to a multiple of 32, and the logits cropped.
            weight: False marks padding examples, which batch norm then leaves out.
            train: whether batch norm uses and updates the batch's statistics.

        Returns:
            One or two logits a pixel. With the plain encoder, `skip="crop"` and sides that
            the poolings do not divide, the map is smaller than the input (572 gives 560).
        """
        if weight is None:
            weight = jnp.ones(images.shape[0], bool)
        encoder = ENCODERS[self.config.encoder]
        height, width = images.shape[1:3]
        x = images.astype(self.config.dtype)
        if height % encoder.multiple or width % encoder.multiple:
            x = center_pad(
                x, *(-(-s // encoder.multiple) * encoder.multiple for s in (height, width))
            )
        maps = encoder.make(self.config, self.axis_name, train)(x, weight)
        x = Decoder(self.config, self.axis_name, train, name="decoder")(maps, weight)
        logits = Head(self.config, name="head")(x)
        if encoder.multiple > 1:
            logits = center_crop(logits, height, width)
        return logits


def make_unet(config: ModelConfig, axis_name: str | None = None) -> UNet:
    """The U-Net that `config` describes, a Linen module.

    >>> model = jaxunet.make_unet(jaxunet.ModelConfig(width=16))
    """
    return UNet(config, axis_name)


def count_parameters(params: Any) -> int:
    """Number of trainable scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
