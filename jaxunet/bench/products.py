"""Matrix products and 3x3 convolutions by themselves, as contestants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunet.bench.flops import layers
from jaxunet.bench.rounds import Contestant, repeated, spread, time_rounds
from jaxunet.config import Config
from jaxunet.model.conv import conv3x3


def matmul_rate(dtype: str, device: jax.Device, seconds: float) -> dict[str, Any]:
    """Operations a second of square matrix products on one device: what it can do at best.

    The best of several sizes, each the median of rounds of about `seconds`.
    """
    # An H100 is at its best at 8192.
    sizes = (512, 1024, 2048) if device.platform == "cpu" else (4096, 8192)
    best: tuple[float, int] = (0.0, 0)
    product = jax.jit(jnp.matmul)
    for size in sizes:
        key = jax.random.key(0)
        x = jax.device_put(jax.random.normal(key, (size, size), jnp.dtype(dtype)), device)
        times = time_rounds({"product": repeated(product, x, x)}, 5, seconds)["product"]
        rate = 2 * size**3 / spread(times)["median"]
        best = max(best, (rate, size))
    return {"flops_per_second": best[0], "size": best[1], "dtype": dtype}


def convolutions(config: Config, batch_size: int) -> dict[tuple[int, ...], list[str]]:
    """The 3x3 convolutions of stride 1 by shape, with the layers that have it.

    Of encoders beside the plain one none is counted: theirs are `lax`'s own, or depthwise.

    Returns:
        Layers by (batch, rows, columns, channels in, channels out).
    """
    found: dict[tuple[int, ...], list[str]] = {}
    side = config.data.image_size
    for name, layer in layers(config.model, side, side).items():
        ours = config.model.encoder == "plain" or name.startswith("decoder/")
        if ours and layer.kernel[:2] == (3, 3):
            shape = (batch_size, layer.rows, layer.columns, *layer.kernel[2:])
            found.setdefault(shape, []).append(name)
    return found


def random_convolution(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seeded input, kernel and output gradient of a convolution of `shape`, float32."""
    b, h, w, cin, cout = shape
    rng = np.random.default_rng(0)
    shapes = ((b, h, w, cin), (3, 3, cin, cout), (b, h, w, cout))
    x, kernel, dy = (rng.normal(size=each).astype(np.float32) for each in shapes)
    return x, kernel, dy


def make_products(shape: tuple[int, ...], dtype: str) -> dict[str, Contestant]:
    """jaxunet's convolution of one shape and its two gradients, each compiled by itself."""
    x, kernel, dy = (jnp.asarray(a, jnp.dtype(dtype)) for a in random_convolution(shape))

    def input_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: conv3x3(x, kernel), x)[1](dy)[0]

    def kernel_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: conv3x3(x, kernel), kernel)[1](dy)[0]

    return {
        "forward": repeated(jax.jit(conv3x3), x, kernel),
        "input_gradient": repeated(jax.jit(input_gradient), x, kernel, dy),
        "kernel_gradient": repeated(jax.jit(kernel_gradient), x, kernel, dy),
    }
