"""What is exported: from uint8 pictures to probabilities, normalisation and views included."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxunet.config import Config
from jaxunet.learning.steps import make_recipe, predict_step
from jaxunet.learning.views import QUARTERS
from jaxunet.runs.loading import TrainedModel

Images = UInt8[Array, "batch size size 3"]
Probabilities = Float[Array, "batch size size 1"]
Dtype = Literal["float32", "bfloat16"]
Program = Callable[[Images], Probabilities]


def program_of(model: TrainedModel, dtype: Dtype | None = None) -> Program:
    """The function of a model's images, with the weights inside.

    Args:
        dtype: what is computed in; by default the model's own.
    """
    config = model.config.model
    recipe = make_recipe(Config(model=replace(config, dtype=dtype or config.dtype)))
    variables = jax.tree.map(jnp.asarray, model.variables)
    quarters = QUARTERS[model.recipe.views]
    turns = [(quarter, flip) for quarter in quarters for flip in (False, True)]

    def seen(images: Images) -> Probabilities:
        return predict_step(recipe, variables, images)

    def probabilities(images: Images) -> Probabilities:
        if not turns:
            return seen(images)
        views = [
            jnp.rot90(jnp.flip(images, 2) if flip else images, quarter, axes=(1, 2))
            for quarter, flip in turns
        ]
        # One batch of all views: a loop would have to be a part of the file.
        found = seen(jnp.concatenate(views)).reshape(len(turns), *images.shape[:3], 1)
        total = jnp.zeros((1, 1, 1, 1))
        for number, (quarter, flip) in enumerate(turns):
            view = jax.lax.index_in_dim(found, number, keepdims=False)
            upright = jnp.rot90(view, -quarter, axes=(1, 2))
            total += jnp.flip(upright, 2) if flip else upright
        return total / len(turns)

    return probabilities


def image_shape(model: TrainedModel, batch: str | int) -> jax.ShapeDtypeStruct:
    """Of the images that it takes; a name stands for any number of them."""
    side = model.config.data.image_size
    count = jax.export.symbolic_shape(batch)[0] if isinstance(batch, str) else batch
    return jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)
