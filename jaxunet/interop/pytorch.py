"""PyTorch state dicts to and from jaxunet's variables, tensor by tensor, bit for bit."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from jaxunet.config import ModelConfig
from jaxunet.errors import DataError, shown
from jaxunet.interop.layouts import Entry, LayoutName, entries, recognize
from jaxunet.interop.weight_files import State
from jaxunet.runs.finite import not_finite

LISTED = 12  # problems that a message names before it only counts them

# NumPy axes that bring PyTorch's kernel to jaxunet's [height, width, in, out]. PyTorch's are
# [out, in, height, width], of transposed convolutions [in, out, height, width]. Neither
# framework turns a kernel round.
_AXES = {"conv": (2, 3, 1, 0), "transposed": (2, 3, 0, 1)}


def _to_variable(entry: Entry, tensor: np.ndarray) -> np.ndarray:
    if entry.kind == "head":  # a 1x1 convolution, kept as a matrix [in, out]
        tensor = tensor[:, :, 0, 0].T
    elif entry.kind in _AXES:
        tensor = tensor.transpose(_AXES[entry.kind])
    return np.array(tensor, np.float32, order="C")


def _to_tensor(entry: Entry, variable: np.ndarray) -> np.ndarray:
    if entry.kind == "head":
        variable = variable.T[:, :, None, None]
    elif entry.kind in _AXES:
        variable = variable.transpose(np.argsort(_AXES[entry.kind]))
    return np.array(variable, np.float32, order="C")


def _wrong_values(entry: Entry, tensor: np.ndarray) -> str:
    counter = entry.kind == "counter"
    if tensor.dtype.kind not in ("iu" if counter else "f"):
        expected = "integer" if counter else "floating point"
        return f"{entry.name} is {tensor.dtype}, expected {expected}"
    if counter:
        counted = int(tensor)
        return "" if 0 <= counted < 2**53 else f"{entry.name} is {counted}, expected a count"
    if entry.path[-1] == "var" and (tensor < 0).any():
        return f"{entry.name} holds {(tensor < 0).sum()} variances below zero"
    return not_finite({entry.name: tensor})


def variables_from_state_dict(
    state: State,
) -> tuple[ModelConfig, LayoutName, dict[str, Any]]:
    """The configuration, layout and variables that a PyTorch state dict stands for.

    Batch norm's `num_batches_tracked` has no variable: see `counters`.

    Raises:
        DataError: the layout is unknown, or keys are missing, left over or of the wrong
            shape or type, hold values that are not finite, variances below zero or counts
            that are none; all are named, with what was expected.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    layout, config = recognize(shapes)
    expected = {entry.name: entry for entry in entries(layout, config)}
    problems = []
    for name, entry in expected.items():
        if name not in state:
            problems.append(f"{name} is missing, expected {list(entry.shape)}")
        elif shapes[name] != entry.shape:
            found = list(shapes[name])
            problems.append(f"{name} is {found}, expected {list(entry.shape)}")
        elif problem := _wrong_values(entry, state[name]):
            problems.append(problem)
    problems += [f"{shown(name)} is left over" for name in state if name not in expected]
    if problems:
        more = len(problems) - LISTED
        raise DataError(
            f"These weights look like the {layout} layout with width {config.width} and "
            f"{config.depth} levels, but: {'; '.join(problems[:LISTED])}"
            + (f"; and {more} more." if more > 0 else ".")
        )
    return config, layout, _tree(expected.values(), state)


def fitting_variables(state: State) -> tuple[ModelConfig, dict[str, Any], list[str]]:
    """The configuration, the variables that those tensors stand for which a U-Net here can
    take, and the others' names: of a network for other channels or classes, say.

    Raises:
        DataError: the layout is unknown.
    """
    heads = ("out.", "outc.")
    shapes = {
        name: tensor.shape
        for name, tensor in state.items()
        if not (name.startswith(heads) and tensor.shape[:1] not in ((1,), (2,)))
    }
    layout, config = recognize(shapes)
    fitting = [
        entry
        for entry in entries(layout, config)
        if entry.path
        and shapes.get(entry.name) == entry.shape
        and not _wrong_values(entry, state[entry.name])
    ]
    taken = {entry.name for entry in fitting}
    left_over = [shown(name) for name in state if name not in taken]
    return config, _tree(fitting, state), left_over


def _tree(fitting: Iterable[Entry], state: State) -> dict[str, Any]:
    variables: dict[tuple[str, ...], np.ndarray] = {
        entry.path: _to_variable(entry, state[entry.name]) for entry in fitting if entry.path
    }
    return traverse_util.unflatten_dict(variables)


def counters(state: State) -> dict[str, int]:
    """Batch norm's counts of training batches (`num_batches_tracked`), by name.

    PyTorch uses them only where `momentum=None`, so jaxunet has none; an imported run keeps
    them beside its weights, for export.
    """
    return {
        name: int(value)
        for name, value in state.items()
        if name.endswith(".num_batches_tracked")
    }


def state_dict_from_variables(
    config: ModelConfig,
    variables: Mapping[str, Any],
    layout: LayoutName,
    *,
    counted: Mapping[str, int] | None = None,
    steps: int = 0,
) -> State:
    """The PyTorch state dict, in PyTorch's order, of a model's variables.

    Gradients, which have the tree of `params`, become PyTorch's `.grad`s likewise.

    Args:
        config: of the model; `layout_of(config)` is its layout.
        counted: what `counters` gave at import, if the weights were imported.
        steps: training batches since then, added to each counter.
    """
    state = {}
    for entry in entries(layout, config):
        if entry.kind == "counter":
            before = (counted or {}).get(entry.name, 0)
            state[entry.name] = np.array(before + steps, np.int64)
            continue
        leaf: Any = variables
        for key in entry.path:
            leaf = leaf[key]
        state[entry.name] = _to_tensor(entry, np.asarray(leaf))
    return state
