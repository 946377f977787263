"""The depthwise convolution as a pure function: each channel has a kernel of its own.

On a CPU, where XLA's grouped convolution is slow, it and its gradients are our own loops
(`jaxunet.model.cpu`); where those can't be, sums of shifted products, which XLA makes one loop
over memory of. Elsewhere it is XLA's own. For a TPU v5e the shifted products would take three
to seven times its cycles, forward and backward: 0.19 M for [8, 32, 32, 144] and 3x3, not 0.76
(XLA's estimate, bfloat16, jax 0.12.0.1).
"""

from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxunet.model import cpu
from jaxunet.model.bilinear import Bilinear, bilinear, sum_type, transposed
from jaxunet.model.conv import DIMENSIONS, Image
from jaxunet.model.portable import is_portable

Padding = tuple[tuple[int, int], tuple[int, int]]
Kernel = Float[Array, "_ _ 1 _"]

PART_PIXELS = 1024
PARTS = 16
"""The loops add up a kernel's gradient in parts of so many pixels, in so many at most."""


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int, padding: Padding
) -> Float[Array, "b h2 w2 c"]:
    """Correlation of each channel with its own kernel.

    Args:
        stride: of rows and of columns.
        padding: zeros before and after the rows, and before and after the columns.
    """
    return _forms(x.shape[1:3], kernel.shape[0], stride, padding)(x, kernel)


@lru_cache
def _forms(sides: tuple[int, int], size: int, stride: int, padding: Padding) -> Bilinear:
    """The convolution of images of so many rows and columns."""
    options: dict[str, Any] = {"size": size, "stride": stride, "padding": padding}
    grouped = partial(_grouped, stride=stride, padding=padding)

    def product(x: Image, kernel: Kernel) -> Image:
        on_cpu = _loop if _loops_can(x, stride) else _shifted
        form = partial(on_cpu, **options)
        return lax.platform_dependent(x, kernel, cpu=form, default=grouped)

    def input_gradient(dy: Image, kernel: Kernel) -> Image:
        def plain(dy: Image, kernel: Kernel) -> Image:
            shape = (dy.shape[0], *sides, dy.shape[3])
            return transposed(lambda x: grouped(x, kernel), shape, dy)

        on_cpu = _loop_back if _loops_can(dy, stride) else _shifted_back
        form = partial(on_cpu, sides=sides, **options)
        return lax.platform_dependent(dy, kernel, cpu=form, default=plain)

    def kernel_gradient(x: Image, dy: Image) -> Kernel:
        def plain(x: Image, dy: Image) -> Kernel:
            shape = (size, size, 1, dy.shape[3])
            return transposed(lambda kernel: grouped(x, kernel), shape, dy)

        on_cpu = _loop_of_kernel if _loops_can(dy, stride) else _sums_of_products
        form = partial(on_cpu, **options)
        return lax.platform_dependent(x, dy, cpu=form, default=plain)

    return bilinear(product, input_gradient, kernel_gradient)[0]


def _grouped(x: Image, kernel: Kernel, *, stride: int, padding: Padding) -> Image:
    return lax.conv_general_dilated(
        *(x, kernel, (stride, stride), padding),
        dimension_numbers=DIMENSIONS,
        feature_group_count=x.shape[3],
    )


def _loops_can(x: Image, stride: int) -> bool:
    """Whether `jaxunet.model.cpu` takes images, or gradients, such as `x`."""
    fits = x.dtype == jnp.float32 and 0 not in x.shape and stride in (1, 2)
    return not is_portable() and fits and cpu.blocks_with_depthwise() is not None


def _call(
    name: str,
    shape: tuple[int, ...],
    *operands: Array,
    size: int,
    stride: int,
    padding: Padding,
) -> Array:
    blocks = cpu.blocks_with_depthwise()
    assert blocks is not None  # by `_loops_can`
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call(blocks.target(name), result, vmap_method="sequential")
    numbers = {"size": size, "stride": stride, "top": padding[0][0], "left": padding[1][0]}
    return call(*operands, **{key: np.int64(value) for key, value in numbers.items()})


def _loop(x: Image, kernel: Kernel, *, size: int, stride: int, padding: Padding) -> Image:
    rows, columns = (
        (side + sum(around) - size) // stride + 1
        for side, around in zip(x.shape[1:3], padding, strict=True)
    )
    shape = (x.shape[0], rows, columns, x.shape[3])
    options: dict[str, Any] = {"size": size, "stride": stride, "padding": padding}
    return _call(cpu.DEPTHWISE, shape, x, kernel, **options)


def _loop_back(dy: Image, kernel: Kernel, *, sides: tuple[int, int], **options: Any) -> Image:
    shape = (dy.shape[0], *sides, dy.shape[3])
    return _call(cpu.DEPTHWISE_INPUT_GRADIENT, shape, dy, kernel, **options)


def _loop_of_kernel(x: Image, dy: Image, *, size: int, **options: Any) -> Kernel:
    pixels = dy.shape[0] * dy.shape[1] * dy.shape[2]
    count = min(max(1, pixels // PART_PIXELS), PARTS)
    shape = (count, size, size, dy.shape[3])
    parts = _call(cpu.DEPTHWISE_KERNEL_GRADIENT, shape, x, dy, size=size, **options)
    # One loop over memory; XLA's reduction of the first dimension is far slower.
    return reduce(jnp.add, parts)[:, :, None]


def _taps(x: Image, *, size: int, stride: int, padding: Padding) -> list[list[Image]]:
    """For each place of the kernel the pixels that it meets, all of the output's shape."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    last_row, last_column = ((side - size) // stride * stride for side in x.shape[1:3])
    return [
        [
            x[:, row : row + last_row + 1 : stride, column : column + last_column + 1 : stride]
            for column in range(size)
        ]
        for row in range(size)
    ]


def _shifted(x: Image, kernel: Kernel, *, size: int, stride: int, padding: Padding) -> Image:
    dtype = sum_type(x.dtype)
    taps = _taps(x, size=size, stride=stride, padding=padding)
    products = [
        tap.astype(dtype) * kernel[None, row, None, column].astype(dtype)
        for row, taps_of_row in enumerate(taps)
        for column, tap in enumerate(taps_of_row)
    ]
    return sum(products[1:], products[0]).astype(x.dtype)


def _sums_of_products(
    x: Image, dy: Image, *, size: int, stride: int, padding: Padding
) -> Kernel:
    dtype = sum_type(x.dtype)
    rows = [
        jnp.stack(
            [jnp.einsum("bhwc,bhwc->c", tap, dy, preferred_element_type=dtype) for tap in row]
        )
        for row in _taps(x, size=size, stride=stride, padding=padding)
    ]
    return jnp.stack(rows)[:, :, None].astype(x.dtype)


def _shifted_back(
    dy: Image,
    kernel: Kernel,
    *,
    sides: tuple[int, int],
    size: int,
    stride: int,
    padding: Padding,
) -> Image:
    """Row `stride * t + p` of the padded input met row t - m of the output at row
    `stride * m + p` of the kernel; the columns alike."""
    dtype = sum_type(dy.dtype)
    reach = -(-size // stride)  # how many rows of the output one of the input met at most
    padded = [side + sum(around) for side, around in zip(sides, padding, strict=True)]
    counts = [-(-side // stride) for side in padded]
    after = [max(count - side, 0) for count, side in zip(counts, dy.shape[1:3], strict=True)]
    around = [(reach - 1, each) for each in after]
    dy = jnp.pad(dy, ((0, 0), *around, (0, 0))).astype(dtype)
    weights = kernel.astype(dtype)

    def phase(p: int, q: int) -> Image:
        products = [
            dy[
                :,
                reach - 1 - m : reach - 1 - m + counts[0],
                reach - 1 - n : reach - 1 - n + counts[1],
            ]
            * weights[None, stride * m + p, None, stride * n + q]
            for m in range(reach)
            for n in range(reach)
            if stride * m + p < size and stride * n + q < size
        ]
        return sum(products[1:], products[0])

    phases = [jnp.stack([phase(p, q) for q in range(stride)], axis=3) for p in range(stride)]
    whole = jnp.stack(phases, axis=2)
    whole = whole.reshape(dy.shape[0], stride * counts[0], stride * counts[1], dy.shape[3])
    top, left = padding[0][0], padding[1][0]
    return whole[:, top : top + sides[0], left : left + sides[1]].astype(kernel.dtype)
