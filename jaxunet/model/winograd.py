"""Winograd's 3x3 convolution F(2x2, 3x3): fewer multiplications, for a CPU and many channels.

Lavin and Gray 2016, arXiv:1509.09308.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

CHANNELS = 128 * 256
PIXELS = 1024
"""Winograd pays from so many pairs of input and output channels and so many pixels of a batch
on: each of its 16 products must be worth more than the sums that prepare its operands and take
its result apart, and its kernel, which takes nearly twice the memory."""

Image = Float[Array, "_ _ _ _"]
Kernel = Float[Array, "3 3 _ _"]

# Winograd F(2x2, 3x3). One axis of the image: with input tile d (4 pixels, of which the next
# tile shares 2), kernel g (3) and output y (2),
#
#     y = A^T [(G g) * (B^T d)]
#
#     B^T = 1  0 -1  0     G =  1    0    0      A^T = 1  1  1  0
#           0  1  1  0         1/2  1/2  1/2           0  1 -1 -1
#           0 -1  1  0         1/2 -1/2  1/2
#           0  1  0 -1          0    0    1
#
# and both axes are transformed alike, so that each of the 4 x 4 places of a tile has a matrix
# product over channels of its own. Operands are four arrays [4, ...], one for each row of a
# tile: XLA's CPU backend makes each in one loop over contiguous channels; as one array of 16
# they take half as long again, and as 16 arrays twice the time to compile.

Planes = list[Array]

INPUT_PAIRS = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1))  # rows of B^T: d[i] ± d[j]


def pays(x: Image, kernel: Kernel) -> bool:
    """In types in which the sums of its transforms lose nothing that matters, and for so many
    channels and pixels."""
    return (
        x.dtype in (jnp.float32, jnp.float64)
        and kernel.shape[2] * kernel.shape[3] >= CHANNELS
        and x.shape[0] * x.shape[1] * x.shape[2] >= PIXELS
    )


def _input_planes(x: Image) -> Planes:
    """B^T d B of each tile: four arrays [4, tiles, channels]."""
    b, h, w, c = x.shape
    rows, columns = -(-h // 2), -(-w // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - h + 1), (1, 2 * columns - w + 1), (0, 0)))
    # Padded once, not again for each place.
    x = lax.optimization_barrier(x).reshape(b, rows + 1, 2, columns + 1, 2, c)

    def pixel(i: int, j: int) -> Array:
        return x[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]

    def place(top: int, bottom: int, row_sign: int, pair: tuple[int, int, int]) -> Array:
        left, right, sign = pair
        upper = pixel(top, left) + sign * pixel(top, right)
        lower = pixel(bottom, left) + sign * pixel(bottom, right)
        return (upper + row_sign * lower).reshape(-1, c)

    return [jnp.stack([place(*row, pair) for pair in INPUT_PAIRS]) for row in INPUT_PAIRS]


def _kernel_planes(kernel: Kernel) -> Planes:
    """G g G^T: four arrays [4, cin, cout]."""

    def transform(g: Sequence[Array]) -> list[Array]:
        outer, middle = (g[0] + g[2]) / 2, g[1] / 2
        return [g[0], outer + middle, outer - middle, g[2]]

    return [jnp.stack(transform([r[0], r[1], r[2]])) for r in transform(list(kernel))]


def _output(planes: Planes, shape: Sequence[int]) -> Image:
    """A^T m A of each tile, put together to images of `shape` (batch, height, width)."""
    b, h, w = shape
    rows, columns, channels = -(-h // 2), -(-w // 2), planes[0].shape[-1]

    def transform(m: Sequence[Array]) -> list[Array]:
        return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]

    lines = transform([m.reshape(4, b, rows, columns, channels) for m in planes])
    image = jnp.stack([jnp.stack(transform(list(line)), axis=3) for line in lines], axis=2)
    return image.reshape(b, 2 * rows, 2 * columns, channels)[:, :h, :w]


def conv(x: Image, kernel: Kernel) -> Image:
    """The convolution: [b, h, w, cin] and [3, 3, cin, cout] give [b, h, w, cout]."""
    pairs = zip(_input_planes(x), _kernel_planes(kernel), strict=True)
    return _output([v @ u for v, u in pairs], x.shape[:3])


def input_gradient(dy: Image, kernel: Kernel) -> Image:
    """The convolution of `dy` with the kernel turned by 180 degrees, its channels swapped.

    Turning it swaps the first and last rows and columns of its planes, no more.
    """
    turned = (3, 1, 2, 0)
    planes = _kernel_planes(kernel)
    kernel_planes = [jnp.stack([planes[i][j] for j in turned]) for i in turned]
    pairs = zip(_input_planes(dy), kernel_planes, strict=True)
    return _output([jnp.einsum("pto,pio->pti", v, u) for v, u in pairs], dy.shape[:3])
