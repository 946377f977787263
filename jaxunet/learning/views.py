"""How a picture is seen: by one or several networks, each in one or several views.

Their probabilities are averaged: test-time augmentation, and an ensemble.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxunet.learning.augment import normalize
from jaxunet.learning.losses import lesion_logits
from jaxunet.model.unet import UNet

Views = Literal["none", "flips", "d4"]
"""How a picture is turned: not at all; by its four flips; by all eight of the square (D4)."""

QUARTERS: dict[Views, tuple[int, ...]] = {"none": (), "flips": (0, 2), "d4": (0, 1, 2, 3)}
"""Quarter turns; each is taken as it is, and flipped left to right."""

Images = UInt8[Array, "batch height width 3"]
Logits = Float[Array, "batch height width 1"]
Network = Callable[[Images], Logits]


def mean_logits(networks: Sequence[Network], images: Images, views: Views) -> Logits:
    """The logit of the mean probability over all networks and views of square `images`.

    NaN where it is not finite in one of them: that says nothing of the pixel.

    They are computed one after another, so that they take no more memory than one.
    """
    if len(networks) == 1 and not QUARTERS[views]:
        return networks[0](images)
    every = jnp.concatenate([_upright(network, images, views) for network in networks])
    # log p - log(1 - p) of the mean p: exact where all are certain, too.
    inside, outside = (jax.nn.logsumexp(jax.nn.log_sigmoid(x), 0) for x in (every, -every))
    return jnp.where(jnp.isfinite(every).all(0), inside - outside, jnp.nan)


def _upright(
    network: Network, images: Images, views: Views
) -> Float[Array, "views batch height width 1"]:
    """What a network says of each view, turned back."""
    if not QUARTERS[views]:
        return network(images)[jnp.newaxis]
    turns = [(quarters, flip) for quarters in QUARTERS[views] for flip in (False, True)]

    def turned(quarters: int, flip: bool) -> Images:
        seen = images[:, :, ::-1] if flip else images
        return jnp.rot90(seen, quarters, axes=(1, 2))

    found = jax.lax.map(network, jnp.stack([turned(*turn) for turn in turns]))
    back = []
    for each, (quarters, flip) in zip(found, turns, strict=True):
        upright = jnp.rot90(each, -quarters, axes=(1, 2))
        back.append(upright[:, :, ::-1] if flip else upright)
    return jnp.stack(back)


def logits_at_input_size(model: UNet, variables: Any, images: Images) -> Logits:
    """Logits for every pixel: a cropped border repeats the nearest logit, so all count."""
    output: Any = model.apply(variables, normalize(images, model.config.encoder))
    logits = lesion_logits(output)
    for axis in (1, 2):
        missing = images.shape[axis] - logits.shape[axis]
        before = [jax.lax.slice_in_dim(logits, 0, 1, axis=axis)] * (missing // 2)
        after = [jax.lax.slice_in_dim(logits, -1, None, axis=axis)] * (missing - missing // 2)
        logits = jnp.concatenate([*before, logits, *after], axis=axis)
    return logits
