"""A picture seen in several views, whose probabilities are averaged: test-time augmentation."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

Views = Literal["none", "flips", "d4"]
"""How a picture is turned: not at all; by its four flips; by all eight of the square (D4)."""

QUARTERS: dict[Views, tuple[int, ...]] = {"none": (), "flips": (0, 2), "d4": (0, 1, 2, 3)}
"""Quarter turns; each is taken as it is, and flipped left to right."""

Images = UInt8[Array, "batch height width 3"]
Logits = Float[Array, "batch height width 1"]


def mean_logits(logits: Callable[[Images], Logits], images: Images, views: Views) -> Logits:
    """The logit of the mean probability over the views of square `images`.

    The views are computed one after another, so that they take no more memory than one.
    """
    if not QUARTERS[views]:
        return logits(images)
    turns = [(quarters, flip) for quarters in QUARTERS[views] for flip in (False, True)]

    def turned(quarters: int, flip: bool) -> Images:
        seen = images[:, :, ::-1] if flip else images
        return jnp.rot90(seen, quarters, axes=(1, 2))

    found = jax.lax.map(logits, jnp.stack([turned(*turn) for turn in turns]))
    back = []
    for each, (quarters, flip) in zip(found, turns, strict=True):
        upright = jnp.rot90(each, -quarters, axes=(1, 2))
        back.append(upright[:, :, ::-1] if flip else upright)
    every = jnp.stack(back)
    # log p - log(1 - p) of the mean p: exact where every view is certain, too.
    inside, outside = (jax.nn.logsumexp(jax.nn.log_sigmoid(x), 0) for x in (every, -every))
    return inside - outside
