"""A program that JAX traced, as nodes of an ONNX graph.

What depends on the weights alone is computed here, so that the graph holds what is done with
a picture and nothing else. Images stay NHWC as they are in JAX; a convolution has a
transposition before and after it, and onnxruntime removes each pair between two of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper

from jaxunet.errors import ConfigError

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


Rule = Callable[[Graph, core.JaxprEqn, Sequence[Value]], Value | list[Value]]
RULES: dict[str, Rule] = {}


def add_program(graph: Graph, program: core.ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
    """The program's results for `operands`, as values of `graph`.

    Raises:
        ConfigError: an operation has no form in ONNX here; the message names its layer.
    """
    return _run(graph, program.jaxpr, program.consts, operands)


def _run(
    graph: Graph, jaxpr: core.Jaxpr, consts: Sequence[Any], operands: Sequence[Value]
) -> list[Value]:
    values: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values.update(zip(jaxpr.invars, operands, strict=True))
    for equation in jaxpr.eqns:
        results = _apply(graph, equation, [read(each) for each in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(each) for each in jaxpr.outvars]


def _apply(graph: Graph, equation: core.JaxprEqn, operands: list[Value]) -> list[Value]:
    kind, params = equation.primitive.name, equation.params
    if kind in ("jit", "pjit", "closed_call", "custom_vjp_call", "custom_jvp_call", "remat2"):
        inner = next(params[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params)
        closed = isinstance(inner, core.ClosedJaxpr)
        return _run(
            graph,
            inner.jaxpr if closed else inner,
            inner.consts if closed else (),
            operands,
        )
    if kind == "platform_index":
        return [np.int32(params["platforms"].index(None))]
    if kind == "cond":
        branch = params["branches"][int(np.asarray(operands[0]))]
        return _run(graph, branch.jaxpr, branch.consts, operands[1:])
    known = all(isinstance(each, np.ndarray) for each in operands)
    if known and kind == "broadcast_in_dim":
        return [_broadcast_known(equation, operands[0])]
    if known:
        found = equation.primitive.bind(*operands, **params)
        found = found if equation.primitive.multiple_results else [found]
        return [np.asarray(each) for each in found]
    if kind not in RULES:
        where = str(equation.source_info.name_stack) or "the whole"
        raise ConfigError(
            f"This model can't be written as ONNX: its operation {kind!r} in {where} has no form "
            "there that jaxunet knows. --format stablehlo holds every model."
        )
    result = RULES[kind](graph, equation, operands)
    return result if isinstance(result, list) else [result]


def _broadcast_known(equation: core.JaxprEqn, operand: Any) -> np.ndarray:
    """Spread out where the shape is known; along symbolic sizes it keeps a side of 1, since
    ONNX spreads that out by itself."""
    shape = equation.params["shape"]
    spread = [1] * len(shape)
    for source, target in enumerate(equation.params["broadcast_dimensions"]):
        spread[target] = operand.shape[source]
    known = [side if isinstance(side, int) else 1 for side in shape]
    return np.broadcast_to(np.reshape(operand, spread), known)


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def _sizes(shape: Sequence[Any]) -> np.ndarray:
    """For `Reshape`: the one symbolic size is what is left over."""
    sizes = [side if isinstance(side, int) else -1 for side in shape]
    if sizes.count(-1) > 1:
        raise ConfigError(f"This model can't be written as ONNX: it has shapes such as {shape}.")
    return np.array(sizes, np.int64)


SAME = {  # one node each, with the operands as they are
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "pow": "Pow", "neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh", "abs": "Abs",
    "sqrt": "Sqrt", "logistic": "Sigmoid", "eq": "Equal", "lt": "Less", "gt": "Greater",
    "le": "LessOrEqual", "ge": "GreaterOrEqual", "and": "And", "or": "Or", "not": "Not",
    "stop_gradient": "Identity", "copy": "Identity", "optimization_barrier": "Identity",
}  # fmt: skip


@rule(*SAME)
def _same(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    return graph.add(SAME[equation.primitive.name], *operands)


@rule("square")
def _square(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    return graph.add("Mul", operands[0], operands[0])


@rule("rsqrt")
def _rsqrt(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    return graph.add("Reciprocal", graph.add("Sqrt", operands[0]))


@rule("is_finite")
def _is_finite(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    (x,) = operands
    neither = graph.add("Or", graph.add("IsInf", x), graph.add("IsNaN", x))
    return graph.add("Not", neither)


@rule("select_n")
def _select(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    chosen, if_false, if_true = operands
    return graph.add("Where", chosen, if_true, if_false)


@rule("convert_element_type")
def _convert(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    to = helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    return graph.add("Cast", operands[0], to=to)


@rule("reshape", "squeeze", "expand_dims")
def _reshape(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    return graph.add("Reshape", operands[0], _sizes(equation.outvars[0].aval.shape))


@rule("broadcast_in_dim")
def _broadcast(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    before, after = equation.invars[0].aval.shape, equation.params["shape"]
    spread: list[Any] = [1] * len(after)
    for source, target in enumerate(equation.params["broadcast_dimensions"]):
        spread[target] = before[source]
    shaped = graph.add("Reshape", operands[0], _sizes(spread))
    # A symbolic size can't be spread out to; what keeps it stays as it is at 1.
    target = [side if isinstance(side, int) else 1 for side in after]
    return graph.add("Expand", shaped, np.array(target, np.int64))


@rule("transpose")
def _transpose(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    return graph.add("Transpose", operands[0], perm=equation.params["permutation"])


@rule("concatenate")
def _concatenate(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    return graph.add("Concat", *operands, axis=equation.params["dimension"])


def _slice_of(
    graph: Graph, x: Value, axis: int, start: int, stop: int, step: int
) -> Value:
    bounds = (np.array([each], np.int64) for each in (start, stop, axis, step))
    return graph.add("Slice", x, *bounds)


@rule("slice")
def _slice(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    x, params = operands[0], equation.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, stop, step) in enumerate(bounds):
        side = equation.invars[0].aval.shape[axis]
        if (start, stop, step) != (0, side, 1):
            x = _slice_of(graph, x, axis, start, stop, step)
    return x


@rule("rev")
def _reverse(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    x, least = operands[0], int(np.iinfo(np.int64).min)
    for axis in equation.params["dimensions"]:
        x = _slice_of(graph, x, axis, -1, least, -1)
    return x


@rule("split")
def _split(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> list[Value]:
    parts, start = [], 0
    for size in equation.params["sizes"]:
        axis = equation.params["axis"]
        parts.append(_slice_of(graph, operands[0], axis, start, start + size, 1))
        start += size
    return parts


@rule("pad")
def _pad(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    x, filler = operands
    config = equation.params["padding_config"]
    assert not any(inner for _, _, inner in config)
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    return graph.add("Pad", x, np.array(pads, np.int64), filler)


@rule("reduce_sum", "reduce_max")
def _reduce(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    kind = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax"}[equation.primitive.name]
    axes = np.array(equation.params["axes"], np.int64)
    return graph.add(kind, operands[0], axes, keepdims=0)


TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def _with_channels_first(graph: Graph, kind: str, x: Value, *others: Value, **attributes: Any) -> Value:
    result = graph.add(kind, graph.add("Transpose", x, perm=TO_NCHW), *others, **attributes)
    return graph.add("Transpose", result, perm=TO_NHWC)


@rule("reduce_window_max")
def _pool(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    params = equation.params
    _, *kernel, _ = params["window_dimensions"]
    _, *strides, _ = params["window_strides"]
    _, *padding, _ = params["padding"]
    return _with_channels_first(
        graph,
        "MaxPool",
        operands[0],
        kernel_shape=kernel,
        strides=strides,
        pads=[before for before, _ in padding] + [after for _, after in padding],
    )


@rule("dot_general")
def _product(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    x, y = operands
    (contracted, batched) = equation.params["dimension_numbers"]
    ranks = [len(each.aval.shape) for each in equation.invars]
    if ranks == [4, 2] and contracted == ((3,), (0,)) and isinstance(y, np.ndarray):
        kernel = y.T[:, :, None, None]  # a 1x1 convolution
        return _with_channels_first(graph, "Conv", x, kernel)
    letters = iter("abcdefghijklmnop")
    names = [[next(letters) for _ in range(rank)] for rank in ranks]
    for one, other in zip(*contracted, strict=True):
        names[1][other] = names[0][one]
    for one, other in zip(*batched, strict=True):
        names[1][other] = names[0][one]
    shared = [names[0][axis] for axis in batched[0]]
    used = {*shared, *(names[0][axis] for axis in contracted[0])}
    free = [each for part in names for each in part if each not in used]
    words = f"{''.join(names[0])},{''.join(names[1])}->{''.join([*shared, *free])}"
    return graph.add("Einsum", x, y, equation=words)


@rule("conv_general_dilated")
def _conv(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    params, (x, kernel) = equation.params, operands
    numbers, padding = params["dimension_numbers"], params["padding"]
    assert (numbers.lhs_spec, numbers.out_spec) == ((0, 3, 1, 2), (0, 3, 1, 2))  # NHWC
    assert isinstance(kernel, np.ndarray)
    kernel = kernel.transpose(numbers.rhs_spec)  # [out, in, height, width]
    if set(params["lhs_dilation"]) == {1}:
        return _with_channels_first(
            graph,
            "Conv",
            x,
            kernel,
            strides=params["window_strides"],
            dilations=params["rhs_dilation"],
            group=params["feature_group_count"],
            pads=[before for before, _ in padding] + [after for _, after in padding],
        )
    # Zeros between the pixels: a transposed convolution by the kernel turned round.
    assert set(params["window_strides"]) == {1} and params["feature_group_count"] == 1
    kernel = kernel[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    rows, columns = kernel.shape[2:]
    cut = [
        side - 1 - each
        for end in (0, 1)
        for side, each in zip((rows, columns), (pair[end] for pair in padding), strict=True)
    ]
    return _with_channels_first(
        graph, "ConvTranspose", x, kernel, strides=params["lhs_dilation"], pads=cut
    )
