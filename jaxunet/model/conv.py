"""The 3x3 convolution as a pure function.

On GPU and TPU the 3x3 convolution is XLA's own. On the CPU, where XLA's is slow, it is that
of `jaxunet.model.cpu`; `lax.platform_dependent` chooses when a program is lowered.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunet.model import cpu

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

WINOGRAD_CHANNELS = 128 * 256
WINOGRAD_PIXELS = 1024
"""Winograd pays from so many pairs of input and output channels and so many pixels of a batch
on: each of its 16 products must be worth more than the sums that prepare its operands and take
its result apart, and its kernel, which takes nearly twice the memory."""
KERNEL_GRADIENT_PIXELS, KERNEL_GRADIENT_PARTS = 8192, 16
"""For each so many pixels of a batch the kernel's gradient gets a part of its own, up to so
many parts, so that threads can share images of few channels. The number of threads must not
count: the sums would depend on it."""

Image = Float[Array, "_ _ _ _"]
Kernel = Float[Array, "3 3 _ _"]


def conv3x3(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "3 3 cin cout"]
) -> Float[Array, "b h w cout"]:
    """3x3 convolution (a correlation, as everywhere in deep learning), zero padding, stride 1.

    On a CPU, in float32, by shape:

    - For many channels (128 by 256, say) and not too few pixels, the output and the gradient
      of the input are Winograd's F(2x2, 3x3) (Lavin and Gray 2016, arXiv:1509.09308): 16 matrix
      products over a quarter of the pixels where the direct form has 9 over all, so 2.25
      times fewer multiplications.
    - Else, and for the gradient of the kernel, they are `jaxunet.model.cpu`'s loops, if it has
      some for this processor (`cpu.blocks`), if images are at least 4 pixels wide, and if the
      channels of the result (of the output; for the input's gradient, of the input) are a
      multiple of a vector's: 16 with AVX-512, 8 with AVX2, 4 on ARM.
    - All else, and every other platform and type, is `lax.conv_general_dilated` (but Winograd
      takes float64, too).

    GFLOP/s, counted for the direct form, of XLA's convolution and of what is chosen instead
    (float32, each compiled alone, medians; two cores of an Intel Xeon with AVX-512, jax
    0.10.2; a product of large matrices reaches 300 there):

        batch   pixels   channels     forward       input gradient   kernel gradient
          4    128x128     3 -> 16      28 -> 267      18               33 -> 106
          4    128x128    16 -> 16     132 -> 323     133 -> 313        48 -> 278
          4    128x128    32 -> 16     134 -> 308     146 -> 311        54 -> 281
          4      64x64    64 -> 32     151 -> 315     154 -> 320        63 -> 264
          4      64x64    32 -> 32     148 -> 323     151 -> 331        56 -> 274
          4      32x32    64 -> 64     143 -> 336     141 -> 333       117 -> 262
          4      16x16   128 -> 128    258 -> 336     231 -> 341       185 -> 276
          4        8x8   256 -> 256    218 -> 294     157 -> 285       116 -> 300
          1      32x32   512 -> 512    263 -> 430     229 -> 413       123 -> 319

    Raises:
        ValueError: the kernel is not 3x3, or of other channels or another type than `x`.
    """
    if kernel.shape[:3] != (3, 3, x.shape[3]) or kernel.dtype != x.dtype:
        raise ValueError(
            f"the kernel is {kernel.dtype}{list(kernel.shape)}, but must be {x.dtype}"
            f"[3, 3, {x.shape[3]}, ...] for images {x.dtype}{list(x.shape)}."
        )
    return _conv(x, kernel)


# The convolution is linear in both operands, and so are its two gradients. The derivatives of
# each of the three are the other two: they can be differentiated as often as one likes.


@jax.custom_vjp
def _conv(x: Image, kernel: Kernel) -> Image:
    if _winograd_pays(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=_winograd_conv, default=_plain_conv)
    if _loops_can(x, kernel.shape[3]):
        shape = (*x.shape[:3], kernel.shape[3])
        loops = functools.partial(_call, cpu.CONV, shape)
        return lax.platform_dependent(x, kernel, cpu=loops, default=_plain_conv)
    return _plain_conv(x, kernel)


@jax.custom_vjp
def _input_gradient(dy: Image, kernel: Kernel) -> Image:
    shape = (*dy.shape[:3], kernel.shape[2])

    def plain(dy: Image, kernel: Kernel) -> Image:
        x = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda x: _plain_conv(x, kernel), x)(dy)[0]

    if _winograd_pays(dy, kernel):
        return lax.platform_dependent(dy, kernel, cpu=_winograd_input_gradient, default=plain)
    if _loops_can(dy, kernel.shape[2]):
        loops = functools.partial(_call, cpu.INPUT_GRADIENT, shape)
        return lax.platform_dependent(dy, kernel, cpu=loops, default=plain)
    return plain(dy, kernel)


@jax.custom_vjp
def _kernel_gradient(x: Image, dy: Image) -> Kernel:
    shape = (3, 3, x.shape[3], dy.shape[3])

    def loops(x: Image, dy: Image) -> Kernel:
        pixels = x.shape[0] * x.shape[1] * x.shape[2]
        count = min(max(1, pixels // KERNEL_GRADIENT_PIXELS), KERNEL_GRADIENT_PARTS)
        parts = _call(cpu.KERNEL_GRADIENT, (count, *shape), x, dy)
        # One loop over memory; XLA's reduction of the first dimension is far slower.
        return functools.reduce(jnp.add, parts)

    def plain(x: Image, dy: Image) -> Kernel:
        kernel = jax.ShapeDtypeStruct(shape, x.dtype)
        return jax.linear_transpose(lambda kernel: _plain_conv(x, kernel), kernel)(dy)[0]

    if _loops_can(x, dy.shape[3]):
        return lax.platform_dependent(x, dy, cpu=loops, default=plain)
    return plain(x, dy)


_conv.defvjp(
    lambda x, kernel: (_conv(x, kernel), (x, kernel)),
    lambda saved, dy: (_input_gradient(dy, saved[1]), _kernel_gradient(saved[0], dy)),
)
_input_gradient.defvjp(
    lambda dy, kernel: (_input_gradient(dy, kernel), (dy, kernel)),
    lambda saved, dx: (_conv(dx, saved[1]), _kernel_gradient(dx, saved[0])),
)
_kernel_gradient.defvjp(
    lambda x, dy: (_kernel_gradient(x, dy), (x, dy)),
    lambda saved, dkernel: (_input_gradient(saved[1], dkernel), _conv(saved[0], dkernel)),
)


def _plain_conv(x: Image, kernel: Kernel) -> Image:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def _winograd_pays(x: Image, kernel: Kernel) -> bool:
    """In types in which the sums of its transforms lose nothing that matters."""
    return (
        x.dtype in (jnp.float32, jnp.float64)
        and kernel.shape[2] * kernel.shape[3] >= WINOGRAD_CHANNELS
        and x.shape[0] * x.shape[1] * x.shape[2] >= WINOGRAD_PIXELS
    )


def _loops_can(x: Image, channels: int) -> bool:
    """Whether `jaxunet.model.cpu` takes `x`, if `channels` are the last of the result."""
    if x.dtype != jnp.float32 or 0 in x.shape or channels == 0:
        return False
    blocks = cpu.blocks()
    return (
        blocks is not None and x.shape[2] >= min(blocks.pixels) and channels % blocks.lanes == 0
    )


def _call(name: str, shape: tuple[int, ...], *operands: Array) -> Array:
    blocks = cpu.blocks()
    assert blocks is not None  # by `_loops_can`
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call(blocks.target(name), result, vmap_method="sequential")
    return call(*operands)


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


def _winograd_conv(x: Image, kernel: Kernel) -> Image:
    pairs = zip(_input_planes(x), _kernel_planes(kernel), strict=True)
    return _output([v @ u for v, u in pairs], x.shape[:3])


def _winograd_input_gradient(dy: Image, kernel: Kernel) -> Image:
    """The convolution of `dy` with the kernel turned by 180 degrees, its channels swapped.

    Turning it swaps the first and last rows and columns of its planes, no more.
    """
    turned = (3, 1, 2, 0)
    planes = _kernel_planes(kernel)
    kernel_planes = [jnp.stack([planes[i][j] for j in turned]) for i in turned]
    pairs = zip(_input_planes(dy), kernel_planes, strict=True)
    return _output([jnp.einsum("pto,pio->pti", v, u) for v, u in pairs], dy.shape[:3])
