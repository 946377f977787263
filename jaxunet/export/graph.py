"""An ONNX graph as it grows: nodes in order, and the arrays that they take."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

OPSET = 18
"""The first whose `Resize` interpolates with antialiasing."""
IR_VERSION = 8
"""The format of the file that came with `OPSET`."""


@dataclass(frozen=True)
class Name:
    """A value that is known only when the graph runs."""

    name: str


Value = Name | np.ndarray


@dataclass
class Graph:
    """Nodes in order, and the arrays that they take."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    _names: dict[Any, str] = field(default_factory=dict)

    def name_of(self, value: Value) -> str:
        if isinstance(value, Name):
            return value.name
        array = np.asarray(value, order="C")
        key = (array.dtype, array.shape, array.tobytes())  # equal arrays are kept once
        name = self._names.setdefault(key, f"array_{len(self._names)}")
        self.arrays[name] = array
        return name

    def add(self, kind: str, *operands: Value, **attributes: Any) -> Name:
        """A node of one result."""
        result = f"value_{len(self.nodes)}"
        names = [self.name_of(each) for each in operands]
        self.nodes.append(helper.make_node(kind, names, [result], **attributes))
        return Name(result)

    def prune(self, results: Sequence[str]) -> None:
        """Leave out what no result needs."""
        needed, kept = set(results), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.arrays = {name: array for name, array in self.arrays.items() if name in needed}
