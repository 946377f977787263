"""A program that JAX traced, added to an ONNX graph.

What depends on the weights alone is computed here, so that the graph holds what is done with
a picture and nothing else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxunet.errors import ConfigError
from jaxunet.export.graph import Graph, Value
from jaxunet.export.operations import RULES


def add_program(
    graph: Graph, program: core.ClosedJaxpr, operands: Sequence[Value]
) -> list[Value]:
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
        return [np.asarray(params["platforms"].index(None))]
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
            f"This model can't be written as ONNX: its operation {kind!r} in {where} has no "
            "form there that jaxunet knows. --format stablehlo holds every model."
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
