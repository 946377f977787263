"""The 3x3 max-pool of stride 2, with a gradient that is the same bits at each run.

XLA's own is select-and-scatter, which has no deterministic form on a GPU.
"""

import itertools
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxunet.model.conv import Image

SIZE, STRIDE = 3, 2
PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))


@jax.custom_vjp
def max_pool3x3(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3x3 max-pool of stride 2 and padding 1, as PyTorch's.

    Where a maximum is tied, the first one in row-major order takes the whole gradient, as in
    PyTorch. The gradient compares the place of each window's maximum with each place of the
    window, and adds up what a pixel won: sums of shifted images, no scatter.
    """
    window, strides = (1, SIZE, SIZE, 1), (1, STRIDE, STRIDE, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, PADDING)


def _winners(x: Image, y: Image) -> Int[Array, "b h2 w2 c"]:
    """The place in each window, 0 to 8, of the first that is its maximum."""
    padded = jnp.pad(x, PADDING, constant_values=-jnp.inf)
    rows, columns = y.shape[1:3]

    def pixel(place: int) -> Image:
        top, left = divmod(place, SIZE)
        return padded[
            :,
            top : top + STRIDE * rows - 1 : STRIDE,
            left : left + STRIDE * columns - 1 : STRIDE,
        ]

    places = jnp.full(y.shape, SIZE**2, jnp.int32)
    return reduce(
        lambda found, place: jnp.where(pixel(place) == y, place, found),
        reversed(range(SIZE**2)),
        places,
    )


def _gradient(x: Image, winners: Int[Array, "b h2 w2 c"], dy: Image) -> Image:
    """Row `2 t + p` of the padded input is row `2 m + p` of window t - m; columns alike."""
    b, rows, columns, channels = dy.shape
    reach = -(-SIZE // STRIDE)
    around = ((0, 0), (reach - 1, 1), (reach - 1, 1), (0, 0))
    winners, dy = jnp.pad(winners, around, constant_values=-1), jnp.pad(dy, around)
    counts = rows + 1, columns + 1

    def part(row: int, column: int) -> Image:
        m, n = row // STRIDE, column // STRIDE
        window = (
            slice(None),
            slice(reach - 1 - m, reach - 1 - m + counts[0]),
            slice(reach - 1 - n, reach - 1 - n + counts[1]),
        )
        return jnp.where(winners[window] == SIZE * row + column, dy[window], 0)

    def phase(p: int, q: int) -> Image:
        places = itertools.product(range(p, SIZE, STRIDE), range(q, SIZE, STRIDE))
        return reduce(jnp.add, (part(row, column) for row, column in places))

    phases = [jnp.stack([phase(p, q) for q in range(STRIDE)], axis=3) for p in range(STRIDE)]
    shape = (b, STRIDE * counts[0], STRIDE * counts[1], channels)
    whole = jnp.stack(phases, axis=2).reshape(shape)
    return whole[:, 1 : 1 + x.shape[1], 1 : 1 + x.shape[2]]


def _forward_rule(x: Image) -> tuple[Image, tuple[Image, Image]]:
    y = max_pool3x3(x)
    return y, (x, y)


max_pool3x3.defvjp(
    _forward_rule, lambda saved, dy: (_gradient(saved[0], _winners(*saved), dy),)
)
