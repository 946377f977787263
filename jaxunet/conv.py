"""The U-Net's three spatial operations as pure functions: 3x3 convolution, 2x2 up, 2x2 pool."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv3x3(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "3 3 cin cout"]
) -> Float[Array, "b h w cout"]:
    """3x3 convolution, zero padding 1, stride 1, without bias."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def up_conv2x2(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "2 2 cin cout"]
) -> Float[Array, "b h2 w2 cout"]:
    """2x2 transposed convolution of stride 2: each pixel becomes a 2x2 block, no overlap."""
    b, h, w, cin = x.shape
    cout = kernel.shape[3]
    blocks = jnp.einsum("bhwi,yxio->bhywxo", x, kernel)
    return blocks.reshape(b, 2 * h, 2 * w, cout)


def max_pool2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2 max-pool of stride 2; an odd last row or column is dropped."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
