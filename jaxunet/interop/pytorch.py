"""jaxunet's variables as a PyTorch state dict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxunet.config import ModelConfig
from jaxunet.interop.layouts import LayoutName, entries


def state_dict_from_variables(
    config: ModelConfig, variables: Mapping[str, Any], layout: LayoutName
) -> dict[str, np.ndarray]:
    """Every tensor of the layout's state dict, with PyTorch's names and shapes."""
    state = {}
    for entry in entries(layout, config):
        if entry.kind == "counter":
            state[entry.name] = np.zeros((), np.int64)
            continue
        value: Any = variables
        for key in entry.path:
            value = value[key]
        array = np.asarray(value)
        if entry.kind == "conv":
            array = array.transpose(3, 2, 0, 1)
        elif entry.kind == "transposed":
            array = array.transpose(2, 3, 0, 1)
        elif entry.kind == "head":
            array = array.T[:, :, None, None]
        state[entry.name] = np.ascontiguousarray(array)
    return state
