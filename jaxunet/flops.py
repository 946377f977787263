"""Floating-point operations of the model, counted from the shapes of its layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxunet.config import ModelConfig
from jaxunet.unet import make_unet


def layer_flops(config: ModelConfig, height: int, width: int) -> dict[str, int]:
    """Operations of each layer in one forward pass of one image of `height` x `width` pixels.

    A multiplication and its addition count 2. Counted are the matrix products alone:
    convolutions (with their zero padding, as is customary), transposed convolutions and the
    head; everything else is below 1% at usual widths.

    Returns:
        By the path of the layer, such as `encoder/level_0/conv_0`, in the order of the tree.
    """
    model = make_unet(config)
    side = config.least_image_size
    images = jnp.zeros((1, side, side, 3))
    shapes = jax.eval_shape(partial(model.init, jax.random.key(0)), images)["params"]
    flops = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        *layer, name = (str(key.key) for key in path)
        if name == "kernel":
            # A transposed convolution visits the pixels of the level below.
            level = _level(layer) + (layer[-1] == "up")
            rows, columns = (_side(config, layer, level, size) for size in (height, width))
            flops["/".join(layer)] = 2 * _product(leaf.shape) * rows * columns
    return flops


def forward_flops(config: ModelConfig, height: int, width: int) -> int:
    """Operations of a forward pass of one image: evaluation, or prediction."""
    return sum(layer_flops(config, height, width).values())


def train_flops(config: ModelConfig, height: int, width: int) -> int:
    """Operations of a training step for one image: forward pass and both gradients.

    Each product has two gradients of its own size, but the first layer's input needs none.
    Recomputation (`model.remat`) is not counted: it is a cost, not work.
    """
    layers = layer_flops(config, height, width)
    return 3 * sum(layers.values()) - layers["encoder/level_0/conv_0"]


def _level(layer: list[str]) -> int:
    return int(layer[1].removeprefix("level_")) if layer[0] != "head" else 0


def _side(config: ModelConfig, layer: list[str], level: int, size: int) -> int:
    if layer[0] == "encoder" or config.skip == "pad":
        return size >> level
    bottom = config.depth - 1  # cropped maps are the bottom's size, doubled at each level
    return (size >> bottom) << (bottom - level)


def _product(shape: Any) -> int:
    result = 1
    for length in shape:
        result *= length
    return result
