"""Neighbouring columns of an image folded into its channels, for a TPU.

A TPU's vectors and matrix units are 128 channels wide: fewer fill a part of them, in time and
in memory. So where a level has 64 channels, two columns lie side by side in one vector, and
where it has 16, eight. A 3x3 convolution stays one: its kernel's blocks are the old kernel's
taps, or zeros. Each operation folds what it takes and unfolds what it gives; XLA drops the pair
of reshapes between two operations, and moves them past biases and ReLU.

Million cycles of a TPU v5e, forward and backward, by XLA's estimate for a training step of
the reference design (8 images, bfloat16, jax 0.12.0.1): sums over the optimised programs of
experiments/results/ahead-before.json and ahead-after.json, which `--hlo` keeps.

                                unfolded   folded
    encoder/level_0/conv_0          2.98     0.74
    encoder/level_0/conv_1          7.21     2.17
    decoder/level_0/conv_0          5.46     4.24
    decoder/level_0/conv_1          6.60     3.54
    joining in decoder/level_0     11.87     none
    pooling                         7.66     1.73
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

LANES = 128

Image = Float[Array, "_ _ _ _"]


def columns(width: int, channels: int) -> int:
    """How many columns of so many channels share a vector; 1 if they don't divide `width`."""
    count = LANES // channels if channels else 1
    count = 1 << max(count, 1).bit_length() - 1  # a power of two, as poolings halve it
    return count if width % count == 0 else 1


def fold(x: Image, count: int) -> Image:
    """`count` neighbouring columns side by side in the channels of one."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w // count, count * c)


def unfold(x: Image, count: int) -> Image:
    """The inverse of `fold`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w * count, c // count)


def fold_kernel(kernel: Float[Array, "3 3 cin cout"], count: int) -> Float[Array, "3 3 _ _"]:
    """The kernel that convolves folded images as `kernel` does unfolded ones.

    From column p of the block before (-1), the same (0) or the next (1) to column q of a block
    it is `count * block + p - q` columns, which a tap reaches if it is -1, 0 or 1.
    """
    if count == 1:
        return kernel
    block, p, q, tap = np.ogrid[-1:2, :count, :count, -1:2]
    reached = jnp.asarray(count * block + p - q == tap, kernel.dtype)
    # Products with 0 and 1 are exact; what columns share is added up at full precision.
    folded = jnp.einsum("kpqt,rtio->rkpiqo", reached, kernel, precision=lax.Precision.HIGHEST)
    return folded.reshape(3, 3, count * kernel.shape[2], count * kernel.shape[3])


def fold_up_kernel(kernel: Float[Array, "2 2 cin cout"], count: int) -> Float[Array, "2 1 _ _"]:
    """The kernel that takes images folded by half of `count` to twice their rows, folded by it.

    A pixel's two columns lie beside each other in the result; no other reaches them.
    """
    cin, cout = kernel.shape[2:]
    pair = kernel.transpose(0, 2, 1, 3).reshape(2, cin, 2 * cout)
    half = count // 2
    rows = [
        jnp.concatenate([pair if i == j else jnp.zeros_like(pair) for j in range(half)], axis=2)
        for i in range(half)
    ]
    return jnp.concatenate(rows, axis=1)[:, None]


def fold_matrix(matrix: Float[Array, "cin cout"], count: int) -> Float[Array, "_ _"]:
    """The same for a product with each pixel; the results of a block lie side by side."""
    return jnp.kron(jnp.eye(count, dtype=matrix.dtype), matrix)


def split_columns(x: Image, count: int) -> tuple[Image, Image]:
    """The even and the odd columns of an image folded by `count`, folded by half of it."""
    parts = jnp.split(x, count, axis=3)
    return _beside(parts[0::2]), _beside(parts[1::2])


def merge_columns(even: Image, odd: Image, count: int) -> Image:
    """The inverse of `split_columns`."""
    pairs = zip(*(jnp.split(x, count // 2, axis=3) for x in (even, odd)), strict=True)
    return _beside([part for pair in pairs for part in pair])


def _beside(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
