"""Whether weights are numbers; with others every score and mask is nonsense, said by nobody."""

from typing import Any

import jax
import numpy as np


def not_finite(tree: Any) -> str:
    """The first array of `tree` with NaN or infinite values, and how many; else ''."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.asarray(leaf)
        count = values.size - int(np.isfinite(values).sum())
        if count:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return f"{name} holds {count} values that are not finite, of {values.size}"
    return ""
