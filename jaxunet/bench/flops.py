"""Floating-point operations of the model, counted from the shapes of its layers."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxunet.config import ModelConfig
from jaxunet.model.unet import make_unet


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
    model = make_unet(config)
    side = config.least_image_size
    images = jnp.zeros((1, side, side, 3))
    shapes = jax.eval_shape(partial(model.init, jax.random.key(0)), images)["params"]
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        *layer, name = (str(key.key) for key in path)
        if name == "kernel":
            # A transposed convolution visits the pixels of the level below.
            level = _level(layer) + (layer[-1] == "up")
            rows, columns = (_side(config, layer, level, size) for size in (height, width))
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
    first = layers(config, height, width)["encoder/level_0/conv_0"]
    return 3 * forward_flops(config, height, width) - first.flops


def _level(layer: list[str]) -> int:
    return int(layer[1].removeprefix("level_")) if layer[0] != "head" else 0


def _side(config: ModelConfig, layer: list[str], level: int, size: int) -> int:
    if layer[0] == "encoder" or config.skip == "pad":
        return size >> level
    bottom = config.depth - 1  # cropped maps are the bottom's size, doubled at each level
    return (size >> bottom) << (bottom - level)
