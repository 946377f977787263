"""The 3x3 convolution as a pure function.

On a GPU the 3x3 convolution is XLA's own. On a CPU, where XLA's is slow, it is that of
`jaxunet.model.cpu`, on a TPU XLA's of folded images (`jaxunet.model.folding`);
`lax.platform_dependent` chooses when a program is lowered.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunet.model import cpu, winograd
from jaxunet.model.bilinear import bilinear, sum_type, transposed
from jaxunet.model.folding import columns, fold, fold_kernel, unfold
from jaxunet.model.portable import is_portable

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

KERNEL_GRADIENT_PIXELS, KERNEL_GRADIENT_PARTS = 8192, 16
"""For each so many pixels of a batch the kernel's gradient gets a part of its own, up to so
many parts, so that threads can share images of few channels. The number of threads must not
count: the sums would depend on it."""

Image = Float[Array, "_ _ _ _"]
Kernel = Float[Array, "3 3 _ _"]
Form = Callable[..., Array]
Operands = tuple[Image, Image, Kernel]


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
      takes float64, too), on a TPU of folded images.

    GFLOP/s, counted for the direct form, of XLA's convolution and of what is chosen instead
    (float32, timed by hand, each compiled alone, medians; two cores of an Intel Xeon with
    AVX-512, jax 0.10.2; a product of large matrices reaches 300 there):

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


def _chosen_conv(x: Image, kernel: Kernel) -> Image:
    forms: dict[str, Form] = {"tpu": _folded_conv}
    if is_portable():
        pass
    elif winograd.pays(x, kernel):
        forms["cpu"] = winograd.conv
    elif _loops_can(x, kernel.shape[3]):
        shape = (*x.shape[:3], kernel.shape[3])
        forms["cpu"] = functools.partial(_call, cpu.CONV, shape)
    return lax.platform_dependent(x, kernel, **forms, default=_plain_conv)


def _chosen_input_gradient(dy: Image, kernel: Kernel) -> Image:
    shape = (*dy.shape[:3], kernel.shape[2])

    def gradient_of(conv: Form) -> Form:
        return lambda dy, kernel: transposed(lambda x: conv(x, kernel), shape, dy)

    forms: dict[str, Form] = {"tpu": gradient_of(_folded_conv)}
    if winograd.pays(dy, kernel):
        forms["cpu"] = winograd.input_gradient
    elif _loops_can(dy, kernel.shape[2]):
        forms["cpu"] = functools.partial(_call, cpu.INPUT_GRADIENT, shape)
    return lax.platform_dependent(dy, kernel, **forms, default=gradient_of(_plain_conv))


def _chosen_kernel_gradient(x: Image, dy: Image) -> Kernel:
    shape = (3, 3, x.shape[3], dy.shape[3])

    def loops(x: Image, dy: Image) -> Kernel:
        pixels = x.shape[0] * x.shape[1] * x.shape[2]
        count = min(max(1, pixels // KERNEL_GRADIENT_PIXELS), KERNEL_GRADIENT_PARTS)
        parts = _call(cpu.KERNEL_GRADIENT, (count, *shape), x, dy)
        # One loop over memory; XLA's reduction of the first dimension is far slower.
        return functools.reduce(jnp.add, parts)

    def plain(x: Image, dy: Image) -> Kernel:
        return transposed(lambda kernel: _plain_conv(x, kernel), shape, dy)

    forms: dict[str, Form] = {"tpu": _folded_kernel_gradient}
    if _loops_can(x, dy.shape[3]):
        forms["cpu"] = loops
    return lax.platform_dependent(x, dy, **forms, default=plain)


_conv, _input_gradient, _kernel_gradient = bilinear(
    _chosen_conv, _chosen_input_gradient, _chosen_kernel_gradient
)


@jax.custom_vjp
def conv3x3_joined(
    first: Float[Array, "b h w c1"],
    second: Float[Array, "b h w c2"],
    kernel: Float[Array, "3 3 cin cout"],
) -> Float[Array, "b h w cout"]:
    """`conv3x3` of two images joined along their channels.

    On a TPU, where columns are folded, it is the sum of two, as joining would unfold them;
    elsewhere one of the joined image, which moves less.
    """

    def joined(first: Image, second: Image, kernel: Kernel) -> Image:
        return conv3x3(jnp.concatenate((first, second), axis=3), kernel)

    operands = first, second, kernel
    if columns(first.shape[2], kernel.shape[3]) == 1:
        return joined(*operands)
    return lax.platform_dependent(*operands, tpu=_sum_of_convs, default=joined)


def _joined_gradients(saved: Operands, dy: Image) -> Operands:
    channels = saved[0].shape[3]

    def joined(first: Image, second: Image, kernel: Kernel, dy: Image) -> Operands:
        dx = _input_gradient(dy, kernel)
        dkernel = _kernel_gradient(jnp.concatenate((first, second), axis=3), dy)
        return dx[..., :channels], dx[..., channels:], dkernel

    def apart(first: Image, second: Image, kernel: Kernel, dy: Image) -> Operands:
        halves = jnp.split(kernel, [channels], axis=2)
        dkernels = [_kernel_gradient(x, dy) for x in (first, second)]
        dxs = [_input_gradient(dy, half) for half in halves]
        return dxs[0], dxs[1], jnp.concatenate(dkernels, axis=2)

    if columns(*dy.shape[2:]) == 1:
        return joined(*saved, dy)
    return lax.platform_dependent(*saved, dy, tpu=apart, default=joined)


def _sum_of_convs(first: Image, second: Image, kernel: Kernel) -> Image:
    halves = jnp.split(kernel, [first.shape[3]], axis=2)
    return _conv(first, halves[0]) + _conv(second, halves[1])


conv3x3_joined.defvjp(
    lambda first, second, kernel: (
        conv3x3_joined(first, second, kernel),
        (first, second, kernel),
    ),
    _joined_gradients,
)


def _plain_conv(x: Image, kernel: Kernel) -> Image:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def _folded_conv(x: Image, kernel: Kernel) -> Image:
    count = columns(x.shape[2], kernel.shape[3])
    return unfold(_plain_conv(fold(x, count), fold_kernel(kernel, count)), count)


def _folded_kernel_gradient(x: Image, dy: Image) -> Kernel:
    count = columns(*dy.shape[2:])
    # What columns share is added up before it is rounded.
    sums = lax.conv_general_dilated(
        fold(x, count),
        fold(dy, count),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=sum_type(x.dtype),
    )
    shape = (3, 3, x.shape[3], dy.shape[3])
    return transposed(lambda kernel: fold_kernel(kernel, count), shape, sums).astype(x.dtype)


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
