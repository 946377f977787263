"""The U-Net's other operations as pure functions: 1x1 convolution, 2x2 max-pool, ReLU.

Each has the form that its platform likes; `lax.platform_dependent` chooses when a program is
lowered. All forms agree to rounding, and so do their gradients.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxunet.model.bilinear import bilinear, transposed
from jaxunet.model.conv import Image
from jaxunet.model.folding import (
    columns,
    fold,
    fold_matrix,
    merge_columns,
    split_columns,
    unfold,
)
from jaxunet.model.portable import is_portable

Matrix = Float[Array, "_ _"]
Windows = tuple[Image, Image, Image, Image]

FILLED = 8
"""Rows of a TPU's vector register: fewer columns of a product cost as many."""


def conv1x1(
    x: Float[Array, "b h w cin"], kernel: Float[Array, "cin cout"]
) -> Float[Array, "b h w cout"]:
    """1x1 convolution to a few channels, summed and returned in float32.

    One matrix product, which for one or two columns XLA makes of multiplications and sums.
    On a TPU, in bfloat16, zeros fill them up to 8, so that it and its kernel's gradient stay
    on the matrix units: 0.16 M cycles instead of 0.94 M by XLA's estimate (counted as in
    `jaxunet.model.folding`).
    """
    return _conv1x1(x, kernel)


def _chosen_product(x: Image, kernel: Matrix) -> Image:
    if x.dtype == jnp.bfloat16:
        return lax.platform_dependent(x, kernel, tpu=_filled_product, default=_product)
    return _product(x, kernel)


def _input_gradient(dy: Image, kernel: Matrix) -> Image:
    shape = (*dy.shape[:3], kernel.shape[0])
    return transposed(lambda x: _product(x, kernel), shape, dy, kernel.dtype)


def _chosen_kernel_gradient(x: Image, dy: Image) -> Matrix:
    def plain(x: Image, dy: Image) -> Matrix:
        shape = (x.shape[3], dy.shape[3])
        return transposed(lambda kernel: _product(x, kernel), shape, dy, x.dtype)

    if x.dtype == jnp.bfloat16:
        return lax.platform_dependent(x, dy, tpu=_filled_kernel_gradient, default=plain)
    return plain(x, dy)


_conv1x1, _, _ = bilinear(_chosen_product, _input_gradient, _chosen_kernel_gradient)


def _product(x: Image, kernel: Matrix) -> Image:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _filled(x: Array) -> Array:
    """With zeros after the columns of the last axis, up to `FILLED`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % FILLED)])


def _filled_product(x: Image, kernel: Matrix) -> Image:
    b, h, w, cin = x.shape
    count = columns(w, cin)
    full = jnp.einsum(
        "io,bhwi->obhw",
        _filled(fold_matrix(kernel, count)),
        fold(x, count),
        preferred_element_type=jnp.float32,
    )
    blocks = full[: count * kernel.shape[1]].reshape(count, kernel.shape[1], b, h, w // count)
    return blocks.transpose(2, 3, 4, 0, 1).reshape(b, h, w, kernel.shape[1])


def _filled_kernel_gradient(x: Image, dy: Image) -> Matrix:
    count = columns(*x.shape[2:])
    sums = jnp.einsum(
        "bhwi,bhwo->io",
        fold(x, count),
        _filled(fold(dy.astype(x.dtype), count)),
        preferred_element_type=jnp.float32,
    )
    shape = (x.shape[3], dy.shape[3])
    sums = sums[:, : count * dy.shape[3]]
    return transposed(lambda kernel: fold_matrix(kernel, count), shape, sums).astype(x.dtype)


@jax.custom_vjp
def max_pool2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2 max-pool of stride 2; an odd last row or column is dropped.

    Where a maximum is tied, the first one in row-major order takes the whole gradient, as in
    PyTorch and in XLA's select-and-scatter (ties are common: zeros after a ReLU). The gradient
    is one comparison a pixel: on a CPU 15 times faster, timed by itself; on a GPU 6% of a step
    faster (R and RP in experiments/results/gpu-forms-bfloat16.json), and the same bits at each
    run (select-and-scatter has no such form). On a TPU it is XLA's own, whose windows are no
    copies there, but of folded images the comparison again.
    """
    # In bfloat16 a CPU's program gave garbage with it (jax 0.12.0.1, fused with a convolution).
    plain = is_portable() and x.dtype == jnp.float32
    default = _reduced_windows if plain else _max_of_windows
    return lax.platform_dependent(x, tpu=_folded_max, default=default)


@jax.custom_vjp
def _pool_gradient(x: Image, dy: Image) -> Image:
    return lax.platform_dependent(x, dy, tpu=_scattered, default=_given_to_winners)


max_pool2x2.defvjp(
    lambda x: (max_pool2x2(x), x),
    lambda x, dy: (_pool_gradient(x, dy),),
)
_pool_gradient.defvjp(
    lambda x, dy: (_pool_gradient(x, dy), (x, dy)),
    # Only second derivatives come here.
    lambda saved, ddx: jax.vjp(_given_to_winners, *saved)[1](ddx),
)


def _reduced_windows(x: Image) -> Image:
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def _folded_max(x: Image) -> Image:
    count = columns(*x.shape[2:])
    if count == 1 or x.shape[1] % 2:
        return _reduced_windows(x)
    return unfold(_highest(_folded_windows(x, count)), count // 2)


def _folded_windows(x: Image, count: int) -> Windows:
    """As `_windows`, folded."""
    b, h, w, c = x.shape
    rows = fold(x, count).reshape(b, h // 2, 2, w // count, count * c)
    return *split_columns(rows[:, :, 0], count), *split_columns(rows[:, :, 1], count)


def _scattered(x: Image, dy: Image) -> Image:
    b, h, w, c = x.shape
    count = columns(w, c)
    if count == 1 or h % 2:
        return jax.vjp(_reduced_windows, x)[1](dy)[0]
    dy = fold(dy, count // 2)
    winner = _winner(_folded_windows(x, count)).astype(x.dtype)
    dy, winner = (merge_columns(each, each, count)[:, :, None] for each in (dy, winner))
    row, column = jnp.arange(2)[:, None], jnp.arange(count * c)[None] // c % 2
    place = (2 * row + column).astype(x.dtype)[None, None, :, None]
    dx = jnp.where(winner == place, dy, 0)
    return unfold(dx.reshape(b, h, w // count, count * c), count)


def _max_of_windows(x: Image) -> Image:
    return _highest(_windows(x))


def _highest(windows: Windows) -> Image:
    a, b, c, d = windows
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _winner(windows: Windows) -> Array:
    """The place of the highest, the first of several."""
    (a, b, c, _), y = windows, _highest(windows)
    return jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))


def _windows(x: Image) -> Windows:
    """The four pixels of each 2x2 window, row by row."""
    b, h, w, c = x.shape
    x = x[:, : h - h % 2, : w - w % 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return x[:, :, 0, :, 0], x[:, :, 0, :, 1], x[:, :, 1, :, 0], x[:, :, 1, :, 1]


def _given_to_winners(x: Image, dy: Image) -> Image:
    height, width = x.shape[1:3]
    winner = _winner(_windows(x))
    place = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    dx = jnp.where(winner[:, :, None, :, None] == place, dy[:, :, None, :, None], 0)
    dx = dx.reshape(x.shape[0], height - height % 2, width - width % 2, x.shape[3])
    return jnp.pad(dx, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))


@jax.custom_vjp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)`; the gradient is 0 at 0, as in PyTorch.

    On GPU and TPU the gradient's mask is taken of the result (`y != 0`), so that `x` need not
    be kept and ReLU goes into the convolution before it: XLA turns `max(x, 0) > 0` back into
    `x > 0`. On a CPU, where that costs 2% of a step, it is of `x`.
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


@jax.custom_vjp
def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`min(max(x, 0), 6)`; the gradient is 0 at 0 and at 6, as in PyTorch."""
    return jnp.clip(x, 0, 6)


relu6.defvjp(
    lambda x: (y := relu6(x), y),
    lambda y, dy: (jnp.where((y > 0) & (y < 6), dy, 0),),
)
