"""Tensors by others' names to the variables of an encoder."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxunet.config import ModelConfig
from jaxunet.errors import DataError
from jaxunet.model.encoders.registry import ENCODERS
from jaxunet.model_config import EncoderName
from jaxunet.pretrained.names import LEFT_OUT, layers_of

Shapes = dict[tuple[str, ...], tuple[int, ...]]

_NORM = {
    "scale": ("params", "weight"),
    "bias": ("params", "bias"),
    "mean": ("batch_stats", "running_mean"),
    "var": ("batch_stats", "running_var"),
}


@lru_cache
def shapes_of(encoder: EncoderName) -> Shapes:
    """The shape of each variable of `encoder`, by its path from the collection on."""
    module = ENCODERS[encoder].make(ModelConfig(encoder=encoder), None, False)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    weight = jax.ShapeDtypeStruct((1,), jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(module.init, key, images, weight)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def names_of(encoder: EncoderName, layout: str) -> dict[tuple[str, ...], str]:
    """What `layout` calls each variable of `encoder`."""
    shapes = shapes_of(encoder)
    found: dict[tuple[str, ...], str] = {}
    for layer in layers_of(encoder):
        place, name = tuple(layer.path.split("/")), layer.names[layout]
        if ("params", *place, "kernel") in shapes:
            found["params", *place, "kernel"] = f"{name}.weight"
        else:
            for ours, (collection, theirs) in _NORM.items():
                found[collection, *place, ours] = f"{name}.{theirs}"
    assert found.keys() == shapes.keys()
    return found


def encoder_variables(
    encoder: EncoderName, tensors: Mapping[str, np.ndarray], source: str
) -> dict[str, Any]:
    """The variables of `encoder` made of a state_dict's tensors.

    Args:
        source: where they come from, for messages.

    Returns:
        `params` and `batch_stats`, as they stand under `encoder` in the network's.

    Raises:
        DataError: tensors are missing, of other shapes or not finite, or some are of no layer.
    """
    layouts = {name: names_of(encoder, name) for name in layers_of(encoder)[0].names}
    layout = max(layouts, key=lambda name: len(set(layouts[name].values()) & tensors.keys()))
    names, shapes = layouts[layout], shapes_of(encoder)
    missing = [name for name in names.values() if name not in tensors]
    more = sorted(
        name for name in tensors.keys() - set(names.values()) if not LEFT_OUT.fullmatch(name)
    )
    wrong = [
        f"{name} is {list(tensors[name].shape)}, not {list(_theirs(shapes[path]))}"
        for path, name in names.items()
        if name in tensors and tensors[name].shape != _theirs(shapes[path])
    ]
    for problem, found in (("lacks", missing), ("also has", more), ("differs:", wrong)):
        if found:
            listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            raise DataError(
                f"{source} does not hold the weights of {encoder}: it {problem} {listed}. Give "
                "the file of this very encoder, or choose model.encoder to fit."
            )
    broken = [name for name in names.values() if not np.isfinite(tensors[name]).all()]
    if broken:
        raise DataError(f"{source} holds values that are not finite: {broken[0]}.")
    below = [
        names[path] for path in names if path[-1] == "var" and tensors[names[path]].min() < 0
    ]
    if below:
        raise DataError(f"{source} holds variances below zero: {below[0]}.")
    flat = {path: _ours(tensors[name], shapes[path]) for path, name in names.items()}
    return traverse_util.unflatten_dict(flat)


def _theirs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a PyTorch tensor beside one of ours."""
    if len(shape) == 2:  # a 1x1 convolution
        return (*shape[::-1], 1, 1)
    return shape if len(shape) == 1 else (shape[3], shape[2], *shape[:2])


def _ours(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    return np.ascontiguousarray(tensor.reshape(shape), np.float32)
