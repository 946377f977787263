"""The builder of the drawn dataset; the pictures themselves are made in `drawing`."""

from functools import partial

from jaxunet.data.builder import Example, PairsBuilder, Plan
from jaxunet.data.drawing import SPLITS, draw
from jaxunet.data.images import encode_png


class Synthetic(PairsBuilder):
    """Dermoscopy-like pictures drawn from a seed."""

    DESCRIPTION = (
        "Pictures drawn by a program to resemble dermoscopy, with exact masks. "
        "Not clinical images, and of no clinical use."
    )


def plan(seed: int, counts: dict[str, int], size: int) -> Plan:
    """Draw `counts` pictures per split at `size` pixels."""
    return Plan(
        items={
            split: {f"{split}_{index:05d}": (split, index) for index in range(counts[split])}
            for split in SPLITS
        },
        make=partial(_make, seed, size),
        where="the synthetic dataset",
        bytes_per_example=4 * size * size,
    )


def _make(seed: int, size: int, item: tuple[str, int]) -> Example:
    split, index = item
    image, mask = draw(seed, split, index, size)
    return {
        "id": f"{split}_{index:05d}",
        "image": encode_png(image),
        "mask": encode_png(mask),
    }
