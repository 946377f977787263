"""The U-Net's other operations as pure functions: 2x2 up, 1x1, 2x2 max-pool, ReLU.

Each has the form that its platform likes; `lax.platform_dependent` chooses when a program is
lowered. All forms agree to rounding, and so do their gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunet.model.conv import DIMENSIONS, Image

BlockKernel = Float[Array, "2 2 _ _"]
Matrix = Float[Array, "_ _"]

FILLED = 8
"""Rows of a TPU's vector register: fewer columns of a product cost as many."""


def up_conv2x2(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "2 2 cin cout"]
) -> Float[Array, "b h2 w2 cout"]:
    """2x2 transposed convolution of stride 2: each pixel becomes a 2x2 block, no overlap.

    On CPU and GPU one matrix product that gives each pixel its block, and one transposition
    that puts the blocks' rows below each other (pairs of pixels stay together); its gradients
    are the same two backwards. On a TPU, where such a transposition is dearer than the
    product, a convolution of the image with zeros between its pixels, whose gradients are
    convolutions, too.
    """
    return _up(x, kernel)


# As the 3x3 convolution, this one is linear in both operands: the derivatives of each of the
# three are the other two.


@jax.custom_vjp
def _up(x: Image, kernel: BlockKernel) -> Image:
    return lax.platform_dependent(x, kernel, tpu=_dilated_up, default=_product_up)


@jax.custom_vjp
def _up_input_gradient(dy: Image, kernel: BlockKernel) -> Image:
    def product(dy: Image, kernel: BlockKernel) -> Image:
        b, h, w, _ = dy.shape
        shape = (b, h // 2, w // 2, kernel.shape[2])
        return _linear_transpose(lambda x: _product_up(x, kernel), shape, dy)

    return lax.platform_dependent(dy, kernel, tpu=_strided_down, default=product)


@jax.custom_vjp
def _up_kernel_gradient(x: Image, dy: Image) -> BlockKernel:
    def product(x: Image, dy: Image) -> BlockKernel:
        shape = (2, 2, x.shape[3], dy.shape[3])
        return _linear_transpose(lambda kernel: _product_up(x, kernel), shape, dy)

    return lax.platform_dependent(x, dy, tpu=_correlate_blocks, default=product)


_up.defvjp(
    lambda x, kernel: (_up(x, kernel), (x, kernel)),
    lambda saved, dy: (_up_input_gradient(dy, saved[1]), _up_kernel_gradient(saved[0], dy)),
)
_up_input_gradient.defvjp(
    lambda dy, kernel: (_up_input_gradient(dy, kernel), (dy, kernel)),
    lambda saved, dx: (_up(dx, saved[1]), _up_kernel_gradient(dx, saved[0])),
)
_up_kernel_gradient.defvjp(
    lambda x, dy: (_up_kernel_gradient(x, dy), (x, dy)),
    lambda saved, dkernel: (_up_input_gradient(saved[1], dkernel), _up(saved[0], dkernel)),
)


def _product_up(x: Image, kernel: BlockKernel) -> Image:
    b, h, w, cin = x.shape
    cout = kernel.shape[3]
    blocks = x.reshape(-1, cin) @ kernel.transpose(2, 0, 1, 3).reshape(cin, 4 * cout)
    rows = blocks.reshape(b, h, w, 2, 2 * cout).transpose(0, 1, 3, 2, 4)
    return rows.reshape(b, 2 * h, 2 * w, cout)


def _linear_transpose(
    function: Callable[[Array], Array], shape: tuple[int, ...], cotangent: Array
) -> Array:
    like = jax.ShapeDtypeStruct(shape, cotangent.dtype)
    return jax.linear_transpose(function, like)(cotangent)[0]


def _dilated_up(x: Image, kernel: BlockKernel) -> Image:
    return lax.conv_general_dilated(
        x, kernel[::-1, ::-1], (1, 1), ((1, 1), (1, 1)), (2, 2), dimension_numbers=DIMENSIONS
    )


def _strided_down(dy: Image, kernel: BlockKernel) -> Image:
    """Each 2x2 block's product with the kernel: the gradient of `_dilated_up`'s input."""
    return lax.conv_general_dilated(
        dy, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWOI", "NHWC")
    )


def _correlate_blocks(x: Image, dy: Image) -> BlockKernel:
    """Sums over pixels of products with each place of their block.

    XLA's own gradient reverses an activation, which costs a TPU a copy of it.
    """
    return lax.conv_general_dilated(
        dy, x, (1, 1), "VALID", rhs_dilation=(2, 2), dimension_numbers=("CHWN", "IHWO", "HWCN")
    )


@jax.custom_vjp
def conv1x1(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "cin cout"]
) -> Float[Array, "b h w cout"]:
    """1x1 convolution to a few channels, summed and returned in float32.

    One matrix product, which for one or two columns XLA makes of multiplications and sums.
    On a TPU, in bfloat16, zeros fill them up to 8, so that it and its kernel's gradient stay
    on the matrix units.
    """
    if x.dtype == jnp.bfloat16:
        return lax.platform_dependent(x, kernel, tpu=_filled_product, default=_product)
    return _product(x, kernel)


@jax.custom_vjp
def _product_kernel_gradient(x: Image, dy: Image) -> Matrix:
    def plain(x: Image, dy: Image) -> Matrix:
        shape = jax.ShapeDtypeStruct((x.shape[3], dy.shape[3]), x.dtype)
        return jax.linear_transpose(lambda kernel: _product(x, kernel), shape)(dy)[0]

    if x.dtype == jnp.bfloat16:
        return lax.platform_dependent(x, dy, tpu=_filled_kernel_gradient, default=plain)
    return plain(x, dy)


def _product_input_gradient(dy: Image, kernel: Matrix) -> Image:
    shape = jax.ShapeDtypeStruct((*dy.shape[:3], kernel.shape[0]), kernel.dtype)
    return jax.linear_transpose(lambda x: _product(x, kernel), shape)(dy)[0]


conv1x1.defvjp(
    lambda x, kernel: (conv1x1(x, kernel), (x, kernel)),
    lambda saved, dy: (
        _product_input_gradient(dy, saved[1]),
        _product_kernel_gradient(saved[0], dy),
    ),
)
_product_kernel_gradient.defvjp(
    lambda x, dy: (_product_kernel_gradient(x, dy), (x, dy)),
    lambda saved, dkernel: (
        _product_input_gradient(saved[1], dkernel),
        conv1x1(saved[0], dkernel),
    ),
)


def _product(x: Image, kernel: Matrix) -> Image:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _filled(x: Array) -> Array:
    """With zeros after the columns of the last axis, up to `FILLED`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % FILLED)])


def _filled_product(x: Image, kernel: Matrix) -> Image:
    full = jnp.einsum("io,bhwi->obhw", _filled(kernel), x, preferred_element_type=jnp.float32)
    return jnp.moveaxis(full[: kernel.shape[1]], 0, 3)


def _filled_kernel_gradient(x: Image, dy: Image) -> Matrix:
    full = _filled(dy.astype(x.dtype))
    sums = jnp.einsum("bhwi,bhwo->io", x, full, preferred_element_type=jnp.float32)
    return sums[:, : dy.shape[3]].astype(x.dtype)


@jax.custom_vjp
def max_pool2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2 max-pool of stride 2; an odd last row or column is dropped.

    Where a maximum is tied, the first one in row-major order takes the whole gradient, as in
    PyTorch and in XLA's select-and-scatter (ties are common: zeros after a ReLU). On a TPU it
    is XLA's own, whose windows are no copies there. Elsewhere the gradient is one comparison a
    pixel: 15 times faster on a CPU, and on a GPU, where it is faster too, the same bits at
    each run (select-and-scatter has no such form).
    """
    return lax.platform_dependent(x, tpu=_reduced_windows, default=_max_of_windows)


@jax.custom_vjp
def _pool_gradient(x: Image, dy: Image) -> Image:
    return lax.platform_dependent(x, dy, tpu=_scattered, default=_given_to_winners)


max_pool2x2.defvjp(
    lambda x: (max_pool2x2(x), x),
    lambda x, dy: (_pool_gradient(x, dy),),
)
_pool_gradient.defvjp(
    lambda x, dy: (_pool_gradient(x, dy), (x, dy)),
    # Only second derivatives come here; select-and-scatter's own needs pairs in one word.
    lambda saved, ddx: jax.vjp(_given_to_winners, *saved)[1](ddx),
)


def _reduced_windows(x: Image) -> Image:
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def _scattered(x: Image, dy: Image) -> Image:
    return jax.vjp(_reduced_windows, x)[1](dy)[0]


def _max_of_windows(x: Image) -> Image:
    a, b, c, d = _windows(x)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _windows(x: Image) -> tuple[Image, Image, Image, Image]:
    """The four pixels of each 2x2 window, row by row."""
    b, h, w, c = x.shape
    x = x[:, : h - h % 2, : w - w % 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return x[:, :, 0, :, 0], x[:, :, 0, :, 1], x[:, :, 1, :, 0], x[:, :, 1, :, 1]


def _given_to_winners(x: Image, dy: Image) -> Image:
    height, width = x.shape[1:3]
    a, b, c, d = _windows(x)
    y = jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))
    winner = jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))
    place = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    dx = jnp.where(winner[:, :, None, :, None] == place, dy[:, :, None, :, None], 0)
    dx = dx.reshape(x.shape[0], height - height % 2, width - width % 2, x.shape[3])
    return jnp.pad(dx, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))


@jax.custom_vjp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)`; the gradient is 0 at 0, as in PyTorch.

    On GPU and TPU the gradient's mask is taken of the result (`y != 0`), so that `x` need not
    be kept and ReLU goes into the convolution before it: XLA turns `max(x, 0) > 0` back into
    `x > 0`. On a CPU, where it costs 2%, it is taken of `x`.
    """
    return jnp.maximum(x, 0)


def _relu_forward_rule(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = jnp.maximum(x, 0)
    return y, (x, y)


def _relu_backward_rule(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    dx = lax.platform_dependent(*saved, dy, cpu=_where_positive, default=_where_not_zero)
    return (dx,)


relu.defvjp(_relu_forward_rule, _relu_backward_rule)


def _where_positive(x: Array, y: Array, dy: Array) -> Array:
    return jnp.where(x > 0, dy, 0)


def _where_not_zero(x: Array, y: Array, dy: Array) -> Array:
    return jnp.where(y != 0, dy, 0)
