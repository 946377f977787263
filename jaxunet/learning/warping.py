"""Where pixels come to lie: flips, turns, scale, rotation and shift as one resampling."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from jaxunet.config import IGNORED

Images = UInt8[Array, "batch height width 3"]
Masks = UInt8[Array, "batch height width 1"]
Maps = Float[Array, "batch 2 2"]
Vectors = Float[Array, "batch 2"]

# Whole numbers, so that a quarter turn moves each pixel onto another exactly.
_QUARTERS = np.array(
    [[[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]]], np.float32
)


def maps(
    flip: Float[Array, " batch"],
    quarters: Int[Array, " batch"],
    zoom: Float[Array, " batch"],
    angle: Float[Array, " batch"],
) -> Maps:
    """For each picture the matrix from a place (row, column) in the result to its source.

    Args:
        flip: -1 to flip left to right, or 1.
        quarters: turns by 90 degrees, 0 to 3.
        zoom: by how much it is enlarged.
        angle: in radians, by which it is turned, too.
    """
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    turned = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)
    q = jnp.asarray(_QUARTERS)[quarters]
    # By hand: a TPU's matrix units would round, and flips and quarter turns are exact.
    both = (q[:, :, :, None] * turned[:, None]).sum(2)
    return both * jnp.stack([jnp.ones_like(flip), flip], -1)[:, None]


def warp(
    images: Images, masks: Masks, matrix: Maps, shift: Vectors, ignores: bool = False
) -> tuple[Images, Masks]:
    """Images and masks whose pixel at p, from the middle, is the one at `matrix @ p + shift`.

    Between four pixels by bilinear interpolation, mirrored at the border (`d c b a | a b c d`).
    An image is rounded; a mask is 255 where the interpolated one is above one half, else 0.

    Args:
        masks: lesion where above 0.
        shift: in pixels, rows and columns.
        ignores: whether masks hold `IGNORED`. A pixel that takes from one that does not count
            does not count either: no truth is made of what has none. (From a share of 1/510
            on; less is the rounding of places, and changes no 8-bit value.)
    """
    count, height, width = images.shape[:3]
    rows, columns = (jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2 for n in (height, width))

    def source(axis: int, size: int) -> tuple[Array, Array]:
        a, b, c = (x[:, None, None] for x in (*matrix[:, axis].T, shift[:, axis]))
        place = a * rows[:, None] + b * columns + (c + (size - 1) / 2)
        turns = (place + 0.5) / (2 * size)
        mirrored = jnp.abs(turns - jnp.round(turns)) * (2 * size) - 0.5
        mirrored = jnp.clip(mirrored, 0, size - 1)
        first = jnp.clip(jnp.floor(mirrored), 0, max(size - 2, 0))
        return first.astype(jnp.int32), mirrored - first

    (row, down), (column, right) = source(0, height), source(1, width)
    first = jnp.arange(count)[:, None, None] * (height * width) + row * width + column
    # A pixel's four values as one word: a fourth of what is gathered, which takes the time.
    colours = jnp.unstack(images, axis=-1)
    truth = masks[..., 0] if ignores else jnp.where(masks[..., 0] > 0, 255, 0)
    words = _words(*colours, truth)
    words = words.reshape(-1)
    corners = [words.at[first + step].get(mode="clip") for step in (0, 1, width, width + 1)]

    def between(channel: int, value: int | None = None) -> Array:
        """A channel, or how much of it is `value`, of 255."""

        def part(words: Array) -> Array:
            found = _channel(words, channel)
            found = found if value is None else jnp.where(found == value, 255, 0)
            return found.astype(jnp.float32)

        a, b, c, d = map(part, corners)
        above, below = a + (b - a) * right, c + (d - c) * right
        return above + (below - above) * down

    varied = [between(channel) for channel in range(3)]
    lesion = between(3, 255 if ignores else None)
    varied = list(map(jnp.round, varied))
    truth = jnp.where(lesion > 127.5, 255, 0)
    if ignores:
        truth = jnp.where(between(3, IGNORED) >= 0.5, IGNORED, truth)
    found = _words(*varied, truth)
    # Without a barrier XLA would gather anew for each use of a value.
    values = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(found), jnp.uint8)
    return values[..., :3], values[..., 3:]


def _words(*channels: Array) -> UInt32[Array, "..."]:
    parts = [each.astype(jnp.uint32) << (8 * place) for place, each in enumerate(channels)]
    return parts[0] | parts[1] | parts[2] | parts[3]


def _channel(words: UInt32[Array, "..."], place: int) -> UInt32[Array, "..."]:
    return (words >> (8 * place)) & 255
