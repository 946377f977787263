"""From stored uint8 to what the network sees, inside the compiled step."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxunet.augmentation_config import STRENGTHS, Ranges
from jaxunet.learning.coloring import add_noise, blur, cut_out, recolor
from jaxunet.learning.warping import maps, warp
from jaxunet.model.encoders.registry import ENCODERS, PerChannel
from jaxunet.model_config import EncoderName

Images = UInt8[Array, "batch height width 3"]
Masks = UInt8[Array, "batch height width 1"]
Draws = Mapping[str, Float[Array, " batch"]]

DRAWS = (
    *("flip", "quarter_turns", "scale", "rotation", "shift_rows", "shift_columns"),
    *("brightness", "contrast", "saturation", "hue", "blur", "noise"),
    *("cutout_row", "cutout_column", "cutout"),
)
"""What is drawn for each picture, evenly from -1 to 1; 0 changes nothing."""


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


def augment(
    ranges: Ranges,
    keys: Key[Array, " batch"],
    images: Images,
    masks: Masks,
    real: Bool[Array, " batch"],
    ignores: bool = False,
) -> tuple[Images, Masks]:
    """Vary each real example by what its key draws from `ranges`.

    Masks are 0, 255 or `IGNORED` after it, or, where all is a flip, as they were. What
    `ranges` leave out takes no time. Examples that are not real stay as they are (a flip alone
    turns them, too: they are zeros).

    Args:
        real: False for padding.
        ignores: whether masks hold `IGNORED`; see `warp`.
    """
    if ranges in (STRENGTHS["none"], STRENGTHS["flip"]):
        return random_flip(keys, images, masks) if ranges.flip else (images, masks)
    keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (len(DRAWS),), minval=-1))(keys)
    # Padding gets 0 of everything.
    draws = dict(zip(DRAWS, jnp.where(real, drawn.T, 0), strict=True))
    mean = _mean_color(images)  # of the picture as it came: no wait for what is made of it
    if _moves(ranges):
        images, masks = _moved(ranges, draws, images, masks, ignores)
    return _recolored(ranges, draws, noise_keys, images, mean), masks


def _moves(ranges: Ranges) -> bool:
    r = ranges
    return r.flip or r.quarter_turns or r.scale != 1 or r.rotation != 0 or r.shift != 0


def _moved(
    ranges: Ranges, draws: Draws, images: Images, masks: Masks, ignores: bool
) -> tuple[Images, Masks]:
    quarters = jnp.floor(4 * jnp.abs(draws["quarter_turns"])).astype(jnp.int32) % 4
    matrix = maps(
        flip=jnp.where(draws["flip"] > 0, -1.0, 1.0) if ranges.flip else jnp.ones(len(images)),
        quarters=quarters * ranges.quarter_turns,
        zoom=ranges.scale ** draws["scale"],
        angle=math.radians(ranges.rotation) * draws["rotation"],
    )
    height, width = images.shape[1:3]
    shift = ranges.shift * jnp.stack(
        [height * draws["shift_rows"], width * draws["shift_columns"]], -1
    )
    return warp(images, masks, matrix, shift, ignores)


def _recolored(
    ranges: Ranges,
    draws: Draws,
    noise_keys: Key[Array, " batch"],
    images: Images,
    mean: Float[Array, "batch 3"],
) -> Images:
    """Images with what is hidden hidden first, so that it looks as all else does."""
    r, pixels = ranges, images.astype(jnp.float32)
    if r.cutout:
        middle = jnp.stack([draws["cutout_row"], draws["cutout_column"]], -1)
        pixels = cut_out(pixels, mean, middle, r.cutout * jnp.abs(draws["cutout"]))
    if r.blur:
        most = r.blur * max(images.shape[1:3])
        pixels = blur(pixels, most * jnp.abs(draws["blur"]), most)
    if r.brightness or r.contrast or r.saturation or r.hue:
        pixels = recolor(
            pixels,
            mean,
            brightness=1 + r.brightness * draws["brightness"],
            contrast=1 + r.contrast * draws["contrast"],
            saturation=1 + r.saturation * draws["saturation"],
            hue=math.radians(r.hue) * draws["hue"],
        )
    if r.noise:
        pixels = add_noise(noise_keys, pixels, 255 * r.noise * jnp.abs(draws["noise"]))
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def _mean_color(images: Images) -> Float[Array, "batch 3"]:
    """In whole numbers, so that it is the same in any order."""
    total = images.astype(jnp.uint32).sum((1, 2))
    return total.astype(jnp.float32) / (images.shape[1] * images.shape[2])
