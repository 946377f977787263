"""What is exported: from uint8 pictures to probabilities, normalisation and views included."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxunet.learning.steps import predict_step
from jaxunet.learning.views import QUARTERS
from jaxunet.model.unet import UNet, make_unet
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
    recipe, temperature = model.recipe, model.recipe.temperature

    def network(own: UNet) -> UNet:
        return make_unet(replace(own.config, dtype=dtype or own.config.dtype))

    alone = replace(recipe, model=network(recipe.model), others=(), views="none", temperature=1)
    parts = [replace(alone, model=network(other)) for other in (recipe.model, *recipe.others)]
    variables = jax.tree.map(jnp.asarray, model.variables)
    each = variables if recipe.others else (variables,)
    turns = [(quarter, flip) for quarter in QUARTERS[recipe.views] for flip in (False, True)]

    def seen(images: Images) -> Probabilities:
        found = [predict_step(*pair, images) for pair in zip(parts, each, strict=True)]
        return found[0] if len(found) == 1 else sum(found[1:], found[0]) / len(found)

    def probabilities(images: Images) -> Probabilities:
        if len(parts) == 1 and not turns:
            return predict_step(replace(parts[0], temperature=temperature), each[0], images)
        mean = _over_views(seen, images, turns)
        if temperature == 1:
            return mean
        return jax.nn.sigmoid((jnp.log(mean) - jnp.log1p(-mean)) / temperature)

    return probabilities


def _over_views(seen: Program, images: Images, turns: list[tuple[int, bool]]) -> Probabilities:
    """The mean of what is seen of each view, as one batch: a loop would have to be a part of
    the file."""
    if not turns:
        return seen(images)
    views = [
        jnp.rot90(jnp.flip(images, 2) if flip else images, quarter, axes=(1, 2))
        for quarter, flip in turns
    ]
    found = seen(jnp.concatenate(views)).reshape(len(turns), *images.shape[:3], 1)
    total = jnp.zeros((1, 1, 1, 1))
    for number, (quarter, flip) in enumerate(turns):
        view = jax.lax.index_in_dim(found, number, keepdims=False)
        upright = jnp.rot90(view, -quarter, axes=(1, 2))
        total += jnp.flip(upright, 2) if flip else upright
    return total / len(turns)


def image_shape(model: TrainedModel, batch: str | int) -> jax.ShapeDtypeStruct:
    """Of the images that it takes; a name stands for any number of them."""
    side = model.config.data.image_size
    count = jax.export.symbolic_shape(batch)[0] if isinstance(batch, str) else batch
    return jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)
