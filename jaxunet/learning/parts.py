"""A batch computed in parts, one after another, in the memory of one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sum_over_parts(
    gradient: Any, params: Any, batch_stats: Any, rows: tuple[Array, ...], parts: int
) -> tuple[Float[Array, ""], Any, Any]:
    """Loss and gradients summed over `parts` microbatches, and the last batch statistics.

    Part m holds the rows m, m + parts, m + 2 parts, ... of the shard, which are those of the
    global batch whose place leaves the remainder m: the same however many devices there are.
    An epoch's padding is spread over the parts.
    """
    if parts == 1:
        (loss, batch_stats), grads = gradient(params, batch_stats, *rows)
        return loss, grads, batch_stats

    def add(carry: Any, part: tuple[Array, ...]) -> tuple[Any, None]:
        total, batch_stats = carry
        (loss, batch_stats), grads = gradient(params, batch_stats, *part)
        return (jax.tree.map(jnp.add, total, (loss, grads)), batch_stats), None

    def split(x: Array) -> Array:
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    summed, _ = jax.lax.scan(add, (nothing, batch_stats), jax.tree.map(split, rows))
    (loss, grads), batch_stats = summed
    return loss, grads, batch_stats
