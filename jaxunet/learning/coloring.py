"""What pixels look like: cut-out, blur, colours and noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Pixels = Float[Array, "batch height width 3"]
PerImage = Float[Array, " batch"]

# The first row is grey, the others are colour: NTSC's YIQ (Recommendation ITU-R BT.470).
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32
)
_RGB = np.linalg.inv(_YIQ)


def recolor(
    pixels: Pixels,
    mean: Float[Array, "batch 3"],
    brightness: PerImage,
    contrast: PerImage,
    saturation: PerImage,
    hue: PerImage,
) -> Pixels:
    """Colours changed, all by one matrix for a picture, as DALI's `color_twist` does.

    Args:
        mean: each picture's mean colour.
        brightness: factor of everything.
        contrast: factor of the distance from the mean grey.
        saturation: factor of the distance from each pixel's own grey.
        hue: turn of the colours round grey, in radians, in YIQ.
    """
    i, q = saturation * jnp.cos(hue) - 1, saturation * jnp.sin(hue)
    none = jnp.zeros_like(i)
    change = jnp.stack([none, none, none, none, i, -q, none, q, i], -1).reshape(-1, 3, 3)
    # What changes only: where nothing does, the matrix is exactly one.
    matrix = jnp.eye(3) + jnp.einsum("ij,bjk,kl->bil", _RGB, change, _YIQ, precision="highest")
    grey = (mean * _YIQ[0]).sum(-1)
    matrix = matrix * (brightness * contrast)[:, None, None]
    offset = brightness * (1 - contrast) * grey
    # Three products a value: too few for matrix units.
    parts = (pixels[..., c, None] * matrix[:, None, None, :, c] for c in range(3))
    return sum(parts, offset[:, None, None, None])


def blur(pixels: Pixels, deviation: PerImage, most: float) -> Pixels:
    """Gaussian blur, cut off at three times `most`, mirrored at the border.

    Args:
        deviation: standard deviations in pixels, from 0 to `most`.
    """
    radius = math.ceil(3 * most)
    squares = jnp.arange(-radius, radius + 1) ** 2
    weights = jnp.exp(-squares / jnp.maximum(2 * deviation[:, None] ** 2, 1e-9))
    weights = weights / weights.sum(-1, keepdims=True)
    for axis in (1, 2):
        border = [(radius, radius) if each == axis else (0, 0) for each in range(4)]
        padded = jnp.pad(pixels, border, mode="symmetric")
        size = pixels.shape[axis]
        shifted = (
            jax.lax.slice_in_dim(padded, place, place + size, axis=axis)
            for place in range(2 * radius + 1)
        )
        each = (part * weights[:, k, None, None, None] for k, part in enumerate(shifted))
        # Without a barrier XLA would blur along one axis anew for each step along the other.
        pixels = jax.lax.optimization_barrier(sum(each, jnp.zeros(())))
    return pixels


def add_noise(keys: Key[Array, " batch"], pixels: Pixels, deviation: PerImage) -> Pixels:
    """The same noise in the three channels: near enough normal, the count of 32 fair bits."""
    shape = pixels.shape[1:3]
    bits = jax.vmap(lambda key: jax.random.bits(key, shape))(keys)
    normal = (jax.lax.population_count(bits).astype(jnp.float32) - 16) / math.sqrt(8)
    return pixels + (normal * deviation[:, None, None])[..., None]


def cut_out(
    pixels: Pixels,
    mean: Float[Array, "batch 3"],
    middle: Float[Array, "batch 2"],
    share: PerImage,
) -> Pixels:
    """A rectangle of the mean colour.

    Args:
        middle: of the rectangle, -1 to 1 from border to border, along each axis.
        share: of each side.
    """

    def inside(axis: int) -> Array:
        size = pixels.shape[1 + axis]
        places = (2 * jnp.arange(size) + 1) / size - 1
        return jnp.abs(places - middle[:, axis, None]) < share[:, None]

    hidden = inside(0)[:, :, None] & inside(1)[:, None]
    return jnp.where(hidden[..., None], mean[:, None, None], pixels)
