"""JAX's operations as nodes of ONNX: for each what it makes of its operands.

Images stay NHWC as they are in JAX; a convolution has a transposition before and after it, and
onnxruntime removes each pair between two of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core
from onnx import helper

from jaxunet.errors import ConfigError
from jaxunet.export.graph import Graph, Value

Rule = Callable[[Graph, core.JaxprEqn, Sequence[Value]], Value | list[Value]]
RULES: dict[str, Rule] = {}


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def _shape(value: Any) -> Sequence[Any]:
    """Of an operand or a result; sizes may be symbolic."""
    shape: Sequence[Any] = value.aval.shape
    return shape


def _sizes(shape: Sequence[Any]) -> np.ndarray:
    """For `Reshape`: the one symbolic size is what is left over."""
    sizes = [side if isinstance(side, int) else -1 for side in shape]
    if sizes.count(-1) > 1:
        raise ConfigError(
            f"This model can't be written as ONNX: it has shapes such as {shape}."
        )
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


@rule("log1p")
def _log1p(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    return graph.add("Log", graph.add("Add", operands[0], np.ones((), np.float32)))


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
    return graph.add("Reshape", operands[0], _sizes(_shape(equation.outvars[0])))


@rule("broadcast_in_dim")
def _broadcast(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    before, after = _shape(equation.invars[0]), equation.params["shape"]
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


def _slice_of(graph: Graph, x: Value, axis: int, start: int, stop: int, step: int) -> Value:
    bounds = (np.array([each], np.int64) for each in (start, stop, axis, step))
    return graph.add("Slice", x, *bounds)


@rule("slice")
def _slice(graph: Graph, equation: core.JaxprEqn, operands: Sequence[Value]) -> Value:
    x, params = operands[0], equation.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, stop, step) in enumerate(bounds):
        side = _shape(equation.invars[0])[axis]
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
    for size in map(int, equation.params["sizes"]):
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


def _with_channels_first(
    graph: Graph, kind: str, x: Value, *others: Value, **attributes: Any
) -> Value:
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
    ranks = [len(_shape(each)) for each in equation.invars]
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
    assert set(params["window_strides"]) == {1}
    assert params["feature_group_count"] == 1
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
