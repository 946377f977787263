"""From stored uint8 to what the network sees, inside the compiled step."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from jaxunet.model.encoders.registry import ENCODERS, PerChannel
from jaxunet.model_config import EncoderName

Images = UInt8[Array, "batch height width 3"]
Masks = UInt8[Array, "batch height width 1"]


def normalize(
    images: Images, encoder: EncoderName = "plain"
) -> Float[Array, "batch height width 3"]:
    """0..255 as `encoder` was trained to see it, float32.

    The plain one, as the reference, from -1 to 1: `(x/255 - 0.5)/0.5`.
    """
    form = ENCODERS[encoder]
    return images.astype(jnp.float32) * _of_channels(form.scale) - _of_channels(form.offset)


def _of_channels(value: PerChannel) -> Any:
    return jnp.asarray(value)[None, None, None] if isinstance(value, tuple) else value


def seed_key(seed: int, impl: str | None = None) -> Key[Array, ""]:
    """JAX's key of a seed from 0 to 2**63 - 1.

    JAX without 64-bit integers takes the low 32 bits alone, so the high ones are folded in.
    """
    key = jax.random.key(seed % 2**32, impl=impl)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def example_keys(
    key: Key[Array, ""], step: Int[Array, ""], places: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """One key for each example, from the step and the example's place in the global batch.

    The place, not the device, so that sharding never changes what is computed.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda place: jax.random.fold_in(step_key, place))(places)


def random_flip(
    keys: Key[Array, " batch"], images: Images, masks: Masks
) -> tuple[Images, Masks]:
    """Flip each image and its mask left to right with probability 0.5."""
    flip = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
    return (
        jnp.where(flip, images[:, :, ::-1], images),
        jnp.where(flip, masks[:, :, ::-1], masks),
    )
