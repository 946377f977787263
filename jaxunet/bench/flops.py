"""Floating-point operations of the model, counted from the shapes of its layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxunet.config import ModelConfig
from jaxunet.model.unet import count_parameters, make_unet


@dataclass(frozen=True)
class Layer:
    """A matrix product of the model: a convolution, a transposed one, or the head.

    Attributes:
        kernel: shape of its kernel.
        rows, columns: pixels that the kernel is applied at.
    """

    kernel: tuple[int, ...]
    rows: int
    columns: int

    @property
    def flops(self) -> int:
        """Operations for one image; a multiplication and its addition count 2."""
        return 2 * math.prod(self.kernel) * self.rows * self.columns


def layers(config: ModelConfig, height: int, width: int) -> dict[str, Layer]:
    """Every layer that does matrix products, for images of `height` x `width` pixels.

    Counted are convolutions (with their zero padding, as is customary), transposed
    convolutions and the head; everything else is about 1% at usual widths.

    Returns:
        By the path of the layer, such as `encoder/level_0/conv_0`, in the order of the tree.
    """
    return _layers(_shapes(config, height, width))


def size(config: ModelConfig, side: int) -> dict[str, float]:
    """The model's `parameters`, and `gflops`: 10^9 operations of a forward pass of one image
    of `side` x `side` pixels. A multiplication and its addition count 2; who counts such a
    pair as one, as `thop` does for most papers on light models, has half of it."""
    shapes = _shapes(config, side, side)
    return {
        "parameters": count_parameters(shapes["params"]),
        "gflops": sum(layer.flops for layer in _layers(shapes).values()) / 1e9,
    }


def _shapes(config: ModelConfig, height: int, width: int) -> Mapping[str, Any]:
    """The shapes of the model's variables and of all that its layers give for one image."""
    model = make_unet(replace(config, remat=False))
    images = jnp.zeros((1, height, width, 3))
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = partial(model.init, capture_intermediates=True, mutable=True)
    return jax.eval_shape(init, key, images)


def _layers(shapes: Mapping[str, Any]) -> dict[str, Layer]:
    results = traverse_util.flatten_dict(shapes["intermediates"])
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        *layer, name = (str(key.key) for key in path)
        if name == "kernel":
            rows, columns = results[(*layer, "__call__")][0].shape[1:3]
            if layer[-1] == "up":  # it visits the pixels of the level below
                rows, columns = rows // 2, columns // 2
            found["/".join(layer)] = Layer(leaf.shape, rows, columns)
    return found


def forward_flops(config: ModelConfig, height: int, width: int) -> int:
    """Operations of a forward pass of one image: evaluation, or prediction."""
    return sum(layer.flops for layer in layers(config, height, width).values())


def train_flops(config: ModelConfig, height: int, width: int) -> int:
    """Operations of a training step for one image: forward pass and both gradients.

    Each product has two gradients of its own size, but the first layer's input needs none.
    Recomputation (`model.remat`) is not counted: it is a cost, not work.
    """
    name = "encoder/level_0/conv_0" if config.encoder == "plain" else "encoder/stem"
    first = layers(config, height, width)[name]
    return 3 * forward_flops(config, height, width) - first.flops
