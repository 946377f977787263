"""Batch normalisation whose statistics are those of the whole global batch.

Linen's own averages the devices' means, which is wrong when they hold unequal numbers of
real examples, as in a padded last batch. This one sums, counts, and then divides.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015), as `torch.nn.SyncBatchNorm` does it.

    Statistics are float32, taken over every pixel of every example of weight True, on all
    devices of `axis_name`. The running variance is the unbiased one, as in PyTorch. A batch
    of padding alone has none: it is normalised by the running ones, which it leaves.
    """

    axis_name: str | None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        weight: Bool[Array, " batch"],
        *,
        train: bool,
    ) -> Float[Array, "batch height width channels"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        if not train:
            mean, var = running_mean.value, running_var.value
        else:
            sum_over_axis = self._sum_over_devices
            values = x.astype(jnp.float32)
            real = weight[:, None, None, None]
            count = sum_over_axis(jnp.sum(weight, dtype=jnp.int32) * (x.shape[1] * x.shape[2]))
            any_real = count > 0
            count = jnp.maximum(count, 1).astype(jnp.float32)
            mean = sum_over_axis(jnp.sum(values, (0, 1, 2), where=real)) / count
            squares = jnp.sum((values - mean[None, None, None]) ** 2, (0, 1, 2), where=real)
            var = sum_over_axis(squares) / count
            if not self.is_initializing():
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                rate = jnp.where(any_real, jnp.float32(1 - self.momentum), 0)
                before = running_mean.value, running_var.value
                running_mean.value += rate * (mean - running_mean.value)
                running_var.value += rate * (unbiased - running_var.value)
                mean, var = (
                    jnp.where(any_real, new, old)
                    for new, old in zip((mean, var), before, strict=True)
                )
        multiplier = scale * jax.lax.rsqrt(var + self.epsilon)
        # Folded into one multiply-add, so that low precision rounds once.
        multiplier, addend = (
            each[None, None, None] for each in (multiplier, bias - mean * multiplier)
        )
        return (x.astype(jnp.float32) * multiplier + addend).astype(x.dtype)

    def _sum_over_devices(self, value: Array) -> Array:
        if self.axis_name is None or self.is_initializing():
            return value
        return jax.lax.psum(value, self.axis_name)
