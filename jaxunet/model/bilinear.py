"""Operations that are linear in an image and in a kernel, such as convolutions."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

Bilinear = Callable[[Array, Array], Array]


def sum_type(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What to add up products of `dtype` in: at least float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def bilinear(
    product: Bilinear, input_gradient: Bilinear, kernel_gradient: Bilinear
) -> tuple[Bilinear, Bilinear, Bilinear]:
    """The same three, each with the other two as its derivatives.

    So they can be differentiated as often as one likes, each in the form of its platform.

    Args:
        product: from an image and a kernel to the result.
        input_gradient: from the result's cotangent and the kernel to the image's.
        kernel_gradient: from the image and the result's cotangent to the kernel's.
    """
    multiply, to_input, to_kernel = map(
        jax.custom_vjp, (product, input_gradient, kernel_gradient)
    )
    multiply.defvjp(
        lambda x, kernel: (multiply(x, kernel), (x, kernel)),
        lambda saved, dy: (to_input(dy, saved[1]), to_kernel(saved[0], dy)),
    )
    to_input.defvjp(
        lambda dy, kernel: (to_input(dy, kernel), (dy, kernel)),
        lambda saved, dx: (multiply(dx, saved[1]), to_kernel(dx, saved[0])),
    )
    to_kernel.defvjp(
        lambda x, dy: (to_kernel(x, dy), (x, dy)),
        lambda saved, dkernel: (to_input(saved[1], dkernel), multiply(saved[0], dkernel)),
    )
    return multiply, to_input, to_kernel


def transposed(
    function: Callable[[Array], Array],
    shape: Sequence[int],
    cotangent: Array,
    dtype: jax.typing.DTypeLike | None = None,
) -> Array:
    """The cotangent of what a linear function takes: an array of `shape`.

    Args:
        dtype: of that array; by default the cotangent's.
    """
    like = jax.ShapeDtypeStruct(tuple(shape), dtype or cotangent.dtype)
    return jax.linear_transpose(function, like)(cotangent)[0]
