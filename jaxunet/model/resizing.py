"""Feature maps cropped, padded and enlarged."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Features = Float[Array, "batch height width channels"]


def center_crop(
    x: Features, height: int, width: int
) -> Float[Array, "batch {height} {width} channels"]:
    """The middle `height` x `width` of `x`; an odd remainder is cut from the far side."""
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    # Of images of a symbolic batch size NumPy's slices would be a gather.
    end = (x.shape[0], top + height, left + width, x.shape[3])
    return lax.slice(x, (0, top, left, 0), end)


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
