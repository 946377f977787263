"""A mask made as a lesion is: one region without holes."""

import numpy as np
from jaxtyping import Bool, UInt8


def clean_up(mask: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Fill the holes of a 0/255 mask, then keep only its largest component.

    Pixels that touch at a corner belong together. Of components of equal size the first in
    reading order stays. An empty mask stays empty.
    """
    import scipy.ndimage  # late: nobody else needs it, and it takes most of a second

    filled = scipy.ndimage.binary_fill_holes(mask)
    labels, count = scipy.ndimage.label(filled, structure=np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(labels.ravel())
        filled = labels == 1 + np.argmax(sizes[1:])
    return np.where(filled, 255, 0).astype(np.uint8)


def cleaned(
    masks: Bool[np.ndarray, "images height width"],
) -> Bool[np.ndarray, "images height width"]:
    """`clean_up` of each of several masks of one size."""
    return np.stack([clean_up(np.where(mask, 255, 0).astype(np.uint8)) > 0 for mask in masks])
