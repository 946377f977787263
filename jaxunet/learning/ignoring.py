"""Which pixels and which examples of a batch count, on the device."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from jaxunet.config import IGNORED
from jaxunet.model.resizing import center_crop

Masks = UInt8[Array, "batch height width 1"]


def counted_pixels(
    ignores: bool, masks: Masks, logits: Float[Array, "batch rows columns classes"]
) -> Bool[Array, "batch rows columns 1"] | None:
    """Where the middle of the masks, as large as the logits, is not `IGNORED`.

    None, which is everywhere, unless it `ignores` any.
    """
    if not ignores:
        return None
    return center_crop((masks != IGNORED).astype(jnp.float32), *logits.shape[1:3]) > 0


def counted_examples(
    ignores: bool, masks: Masks, real: Bool[Array, " batch"]
) -> Bool[Array, " batch"]:
    """The real examples that have a pixel that counts: augmentation may leave none in view."""
    return real & (masks != IGNORED).any((1, 2, 3)) if ignores else real
