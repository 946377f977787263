"""The U-Net's spatial operations as pure functions: 3x3 convolution, 2x2 up, 2x2 max-pool.

On GPU and TPU the 3x3 convolution is XLA's own. On the CPU it is written out for the shapes
where XLA's is slow; `lax.platform_dependent` chooses when a program is lowered.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

WINOGRAD_CHANNELS = 64
"""Winograd pays from so many channels on both sides: each of its 16 products must be worth
more than the sums that prepare its operands and take its result apart."""
GROUPED_CHANNELS = 16
"""With fewer channels on one side, and no more on the other, neighbouring pixels of a row are
taken together: XLA has a fast convolution for the CPU only from so many on."""
SHIFT_CHANNELS = 16
SHIFT_PIXELS = 32 * 32
"""Below `WINOGRAD_CHANNELS`, the kernel's gradient is one product of shifted copies from so
many channels on, for images of more than so many pixels: XLA's rate falls with the image
there."""
STRIP_WIDTH = 2048
"""Strips of images are laid side by side up to so many columns: XLA shares a convolution
among cores by its columns, a few hundred to each."""

Image = Float[Array, "_ _ _ _"]
Kernel = Float[Array, "3 3 _ _"]


@jax.custom_vjp
def conv3x3(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "3 3 cin cout"]
) -> Float[Array, "b h w cout"]:
    """3x3 convolution (a correlation, as everywhere in deep learning), zero padding, stride 1.

    On the CPU, in float32 or float64, by shape:

    - From 64 channels on both sides, all three products (forward, gradient of the input,
      gradient of the kernel) are Winograd's F(2x2, 3x3) (Lavin and Gray 2016,
      arXiv:1509.09308): 16 matrix products over a quarter of the pixels where the direct form
      has 9 over all, so 2.25 times fewer multiplications.
    - Below that, the forward product is XLA's convolution of strips of the images laid side
      by side: XLA (YNNPACK) shares a convolution among cores by its columns alone, and leaves
      images of 64 columns to one core. The gradient of the input is not shared so: the
      gradient of the kernel keeps the other cores busy meanwhile. That one, for all but small
      images, is a single matrix product of the output's gradient, shifted three ways by rows,
      and the input, shifted three ways by columns.
    - Below 16 channels on one side, groups of neighbouring pixels stand for more channels.
    - All else, and every other platform and type, is `lax.conv_general_dilated`.

    GFLOP/s, counted for the direct form, of XLA's convolution and of the form that is chosen
    instead (batch 4, float32, each compiled alone, medians; two cores of an Intel Xeon with
    AVX-512, jax 0.10.2; a product of large matrices reaches 300 there):

        pixels   channels   forward      input gradient   kernel gradient
        128x128    3 -> 16   30 ->  83     19 ->  35         35
        128x128   16 -> 16  147           124                50 ->  67
        128x128   32 -> 16  149 -> 162    161                61 ->  83
         64x64    64 -> 32  162 -> 213    166                62 -> 114
         64x64    32 -> 32  157 -> 204    163                62 ->  95
         32x32    64 -> 64  152 -> 206    153 -> 221        124 ->  76
         32x32   128 -> 64  153 -> 292    150 -> 320        125 ->  83
         16x16  128 -> 128  271 -> 210    247 -> 212        194 -> 125

    Alone is not in a step, where products run side by side and share cores and caches. There
    Winograd's kernel gradient does no worse than XLA's in spite of the last three rows: with
    XLA's at 32x32 a step of width 16 takes as long, 122 ms, and with XLA's at 16x16 and 8x8
    too, 128 ms. With more channels it is far ahead alone, too (32x32, 512 -> 512, batch 1:
    120 -> 310).
    """
    return _forward(x, kernel)


def _forward(x: Image, kernel: Kernel) -> Image:
    if _winograd_pays(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=_winograd_conv, default=_plain_conv)
    if _grouping_pays(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=_grouped_conv, default=_plain_conv)
    if _strips_pay(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=_strip_conv, default=_plain_conv)
    return _plain_conv(x, kernel)


def _forward_rule(x: Image, kernel: Kernel) -> tuple[Image, tuple[Image, Kernel]]:
    return _forward(x, kernel), (x, kernel)


def _backward_rule(residuals: tuple[Image, Kernel], dy: Image) -> tuple[Image, Kernel]:
    x, kernel = residuals
    return _input_gradient(x, kernel, dy), _kernel_gradient(x, kernel, dy)


def _input_gradient(x: Image, kernel: Kernel, dy: Image) -> Image:
    def plain(kernel: Kernel, dy: Image) -> Image:
        return jax.linear_transpose(lambda x: _plain_conv(x, kernel), x)(dy)[0]

    if _winograd_pays(x, kernel):
        return lax.platform_dependent(kernel, dy, cpu=_winograd_input_gradient, default=plain)
    if _grouping_pays(x, kernel):
        return lax.platform_dependent(kernel, dy, cpu=_grouped_input_gradient, default=plain)
    return plain(kernel, dy)


def _kernel_gradient(x: Image, kernel: Kernel, dy: Image) -> Kernel:
    def plain(x: Image, dy: Image) -> Kernel:
        return jax.linear_transpose(lambda k: _plain_conv(x, k), kernel)(dy)[0]

    if _winograd_pays(x, kernel):
        return lax.platform_dependent(x, dy, cpu=_winograd_kernel_gradient, default=plain)
    if _shifts_pay(x, kernel):
        return lax.platform_dependent(x, dy, cpu=_shifted_kernel_gradient, default=plain)
    return plain(x, dy)


conv3x3.defvjp(_forward_rule, _backward_rule)


def up_conv2x2(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "2 2 cin cout"]
) -> Float[Array, "b h2 w2 cout"]:
    """2x2 transposed convolution of stride 2: each pixel becomes a 2x2 block, no overlap.

    One matrix product that gives each pixel its block, and one transposition that puts the
    blocks' rows below each other (pairs of pixels stay together); its gradients are the same
    two backwards.
    """
    b, h, w, cin = x.shape
    cout = kernel.shape[3]
    blocks = x.reshape(-1, cin) @ kernel.transpose(2, 0, 1, 3).reshape(cin, 4 * cout)
    rows = blocks.reshape(b, h, w, 2, 2 * cout).transpose(0, 1, 3, 2, 4)
    return rows.reshape(b, 2 * h, 2 * w, cout)


@jax.custom_vjp
def max_pool2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2 max-pool of stride 2; an odd last row or column is dropped.

    Where a maximum is tied, the first one in row-major order takes the whole gradient, as in
    PyTorch and in XLA's select-and-scatter (ties are common: zeros after a ReLU). The
    gradient is one comparison a pixel instead, 15 times faster on the CPU.
    """
    a, b, c, d = _windows(x)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _windows(x: Image) -> tuple[Image, Image, Image, Image]:
    """The four pixels of each 2x2 window, row by row."""
    b, h, w, c = x.shape
    x = x[:, : h - h % 2, : w - w % 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return x[:, :, 0, :, 0], x[:, :, 0, :, 1], x[:, :, 1, :, 0], x[:, :, 1, :, 1]


def _max_pool_forward_rule(x: Image) -> tuple[Image, Image]:
    return max_pool2x2(x), x


def _max_pool_backward_rule(x: Image, dy: Image) -> tuple[Image]:
    height, width = x.shape[1:3]
    a, b, c, d = _windows(x)
    y = jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))
    winner = jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))
    place = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    dx = jnp.where(winner[:, :, None, :, None] == place, dy[:, :, None, :, None], 0)
    dx = dx.reshape(x.shape[0], height - height % 2, width - width % 2, x.shape[3])
    return (jnp.pad(dx, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))),)


max_pool2x2.defvjp(_max_pool_forward_rule, _max_pool_backward_rule)


def _plain_conv(x: Image, kernel: Kernel) -> Image:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def _wide_float(x: Array) -> bool:
    """Whether the sums of Winograd's transforms lose nothing that matters in `x`'s type."""
    return x.dtype in (jnp.float32, jnp.float64)


def _winograd_pays(x: Image, kernel: Kernel) -> bool:
    return _wide_float(x) and min(kernel.shape[2:]) >= WINOGRAD_CHANNELS


def _shifts_pay(x: Image, kernel: Kernel) -> bool:
    return (
        _wide_float(x)
        and min(kernel.shape[2:]) >= SHIFT_CHANNELS
        and x.shape[1] * x.shape[2] > SHIFT_PIXELS
    )


def _strips_pay(x: Image, kernel: Kernel) -> bool:
    """XLA shares the convolutions of fewer channels among cores by itself."""
    return _wide_float(x) and max(kernel.shape[2:]) > GROUPED_CHANNELS


def _grouping_pays(x: Image, kernel: Kernel) -> bool:
    channels = kernel.shape[2:]
    return _wide_float(x) and min(channels) < GROUPED_CHANNELS >= max(channels)


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
# product over channels of its own. The gradient of the kernel is the same form transposed:
# G^T [(B^T d) * (A dy)]. Operands are four arrays [4, ...], one for each row of a tile: XLA's
# CPU backend makes each in one loop over contiguous channels; as one array of 16 they take
# half as long again, and as 16 arrays twice the time to compile.

Planes = list[Array]

INPUT_PAIRS = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1))  # rows of B^T: d[i] ± d[j]


def _input_planes(x: Image) -> Planes:
    """B^T d B of each tile: four arrays [4, tiles, channels]."""
    b, h, w, c = x.shape
    rows, columns = -(-h // 2), -(-w // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - h + 1), (1, 2 * columns - w + 1), (0, 0)))
    # Padded once, not again for each place; and made anew for the kernel's gradient instead
    # of kept from the forward pass, which would take four times the memory.
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


def _output_gradient_planes(dy: Image) -> Planes:
    """A dy A^T of each tile: four arrays [4, tiles, channels]."""
    b, h, w, c = dy.shape
    rows, columns = -(-h // 2), -(-w // 2)
    if h % 2 or w % 2:
        dy = jnp.pad(dy, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    dy = dy.reshape(b, rows, 2, columns, 2, c)

    def transform(y0: Array, y1: Array) -> list[Array]:
        return [y0, y0 + y1, y0 - y1, -y1]

    lines = transform(dy[:, :, 0], dy[:, :, 1])
    return [
        jnp.stack([p.reshape(-1, c) for p in transform(line[:, :, :, 0], line[:, :, :, 1])])
        for line in lines
    ]


def _winograd_conv(x: Image, kernel: Kernel) -> Image:
    pairs = zip(_input_planes(x), _kernel_planes(kernel), strict=True)
    return _output([v @ u for v, u in pairs], x.shape[:3])


def _winograd_input_gradient(kernel: Kernel, dy: Image) -> Image:
    """The convolution of `dy` with the kernel turned by 180 degrees, its channels swapped.

    Turning it swaps the first and last rows and columns of its planes, no more.
    """
    turned = (3, 1, 2, 0)
    planes = _kernel_planes(kernel)
    kernel_planes = [jnp.stack([planes[i][j] for j in turned]) for i in turned]
    pairs = zip(_input_planes(dy), kernel_planes, strict=True)
    return _output([jnp.einsum("pto,pio->pti", v, u) for v, u in pairs], dy.shape[:3])


def _winograd_kernel_gradient(x: Image, dy: Image) -> Kernel:
    def transform(m: Sequence[Array]) -> list[Array]:
        half_sum, half_difference = (m[1] + m[2]) / 2, (m[1] - m[2]) / 2
        return [m[0] + half_sum, half_difference, half_sum + m[3]]

    # Transposed on its own, before the product: XLA leaves a product whose left operand lies
    # the other way to Eigen, with which a step of width 16 takes 3% longer (117 to 121 ms).
    planes = [lax.optimization_barrier(v.swapaxes(1, 2)) for v in _input_planes(x)]
    pairs = zip(planes, _output_gradient_planes(dy), strict=True)
    rows = transform([v @ d for v, d in pairs])
    return jnp.stack([jnp.stack(transform(list(row))) for row in rows])


def _strip_conv(x: Image, kernel: Kernel) -> Image:
    """The convolution of one wide image: strips of all images, side by side.

    Each strip brings the rows above and below it along, and is followed by a column of zeros;
    what the convolution gives for that column is dropped.
    """
    b, h, w, cin = x.shape
    strips = 1
    while b * strips * (w + 1) < STRIP_WIDTH and h % (2 * strips) == 0:
        strips *= 2
    rows = h // strips
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
    x = jnp.stack([x[:, s * rows : (s + 1) * rows + 2] for s in range(strips)], axis=1)
    x = x.transpose(2, 0, 1, 3, 4).reshape(1, rows + 2, b * strips * (w + 1), cin)
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), ((0, 0), (1, 1)), dimension_numbers=DIMENSIONS
    )
    y = y.reshape(rows, b, strips, w + 1, -1)[:, :, :, :w]
    return y.transpose(1, 2, 0, 3, 4).reshape(b, h, w, -1)


def _grouped_conv(x: Image, kernel: Kernel) -> Image:
    """The convolution of groups of 2 or 4 neighbours, which hold 2 or 4 times the channels.

    With one column of zeros on the left, the 2 (4) outputs of a group depend on that group
    and the next: a kernel of 3 x 2 groups, a third (two thirds) of it zero.
    """
    b, h, w, cin = x.shape
    cout = kernel.shape[3]
    size = 4 if max(cin, cout) <= GROUPED_CHANNELS // 2 else 2
    groups = -(-w // size)
    x = jnp.pad(x, ((0, 0), (0, 0), (1, size * (groups + 1) - w - 1), (0, 0)))
    x = x.reshape(b, h, groups + 1, size * cin)
    # taps[i, input] is kernel[:, input - output] for each of the group's outputs, or zero.
    taps = [
        jnp.pad(kernel, ((0, 0), (output, 2 * size - 3 - output), (0, 0), (0, 0)))
        for output in range(size)
    ]
    grouped_kernel = jnp.stack(taps, axis=3).reshape(3, 2, size * cin, size * cout)
    y = lax.conv_general_dilated(
        x, grouped_kernel, (1, 1), ((1, 1), (0, 0)), dimension_numbers=DIMENSIONS
    )
    return y.reshape(b, h, size * groups, cout)[:, :, :w]


def _grouped_input_gradient(kernel: Kernel, dy: Image) -> Image:
    """The convolution of `dy` with the kernel turned by 180 degrees, its channels swapped."""
    return _grouped_conv(dy, kernel[::-1, ::-1].swapaxes(2, 3))


def _shifted_kernel_gradient(x: Image, dy: Image) -> Kernel:
    """[dy of the rows above, here, below]^T [x of the columns left, here, right].

    All nine pairs of shifts in one product over the pixels: what the kernel's row i takes
    from x one row further down, it takes from dy one row further up. The copies take three
    times the memory of both (145 -> 207 MB for a step of width 16, 128 px, batch 4).
    """
    cin, cout = x.shape[3], dy.shape[3]
    rows = jnp.concatenate(_neighbours(dy, axis=1)[::-1], axis=-1).reshape(-1, 3 * cout)
    columns = jnp.concatenate(_neighbours(x, axis=2), axis=-1).reshape(-1, 3 * cin)
    return (rows.T @ columns).reshape(3, cout, 3, cin).transpose(0, 2, 3, 1)


def _neighbours(x: Image, axis: int) -> tuple[Image, Image, Image]:
    """For each place along `axis`, what stands before, at and after it; zero outside."""
    size = x.shape[axis]

    def shift(start: int, low: int, high: int) -> Image:
        inner = lax.slice_in_dim(x, start, start + size - 1, axis=axis)
        return jnp.pad(inner, [(low, high) if a == axis else (0, 0) for a in range(4)])

    return shift(0, 1, 0), x, shift(1, 0, 1)
