"""How XLA calls a loop, and how the loop's work is shared among XLA's threads.

A call is cut into items. XLA's threads, and the one that was called, take them one by one
from a common counter until none is left. A thread that starts too late finds nothing to do;
the last to let go of the common state frees it. What an item computes doesn't depend on who
computes it, so that results are the same bit for bit however many threads there are.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir

from jaxunet.model.cpu.emit import (
    I32,
    I64,
    NULL,
    PTR,
    Builder,
    Value,
    byte,
    declared,
    equal,
    for_range,
    function,
    less,
    maximum,
    minimum,
    number,
    read,
    release,
    total,
    variable,
    while_true,
)

FFI_VERSION = (0, 3)
"""The version of XLA's foreign function interface whose structures are laid out so, in bytes
(`xla/ffi/api/c_api.h` among jaxlib's files). Later minor versions only add to their ends, and
XLA serves a function by the version that it answers: this one, whichever XLA asks."""
FRAME = {
    **{"extension": 8, "api": 16, "context": 24},
    **{"arguments": 72, "results": 112, "attributes": 160},
}
SCALAR = {"value": 8}
BUFFER = {"data": 24, "rank": 32, "dimensions": 40}
API = {"destroy_error": 64, "schedule": 136, "threads": 144}
EXTENSION = {"type": 8, "metadata": 24}
METADATA = {"major": 24, "minor": 28, "traits": 32, "state": 40}
METADATA_EXTENSION = 1  # the type of the extension by which XLA asks for metadata

WORK = (
    *("next", "done", "holders", "items"),  # counters
    *("x", "other", "out"),  # pointers to the values of the operands and the result
    *("parts", "groups", "batch", "rows", "height", "width", "cin", "cout"),
    *("other_height", "other_width", "out_height", "out_width"),
    *("left", "size", "stride", "top"),  # attributes
)
"""The fields of the common state, 8 bytes each; `height`, `width` and `cin` are of `x`, and
`rows` its images' rows counted through. Of the others, two are the second dimension and the
third."""

Share = Callable[[Builder, dict[str, Value]], tuple[Value, Value]]
"""Writes code for into how many parts of the rows and how many groups of channels the work is
cut, given the fields of `WORK` that are known, `threads`, and `results`, the size of the
result's first dimension."""


def fields(b: Builder, work: Value, names: Sequence[str]) -> list[Value]:
    """The values of some fields of the common state."""
    return [
        read(b, PTR if name in ("x", "other", "out") else I64, work, 8 * WORK.index(name))
        for name in names
    ]


def slice_of(b: Builder, size: Value, index: Value, count: Value) -> tuple[Value, Value]:
    """Where the slice `index` of `count` nearly equal ones begins and ends."""

    def bound(i: Value) -> Value:
        return b.udiv(b.mul(i, size), count)

    return bound(index), bound(b.add(index, number(1)))


def whole_blocks(
    b: Builder, size: Value, index: Value, count: Value, block: int
) -> tuple[Value, Value]:
    """A slice in whole blocks, but for the last, which ends with the whole."""
    first, end = slice_of(b, b.udiv(size, number(block)), index, count)
    is_last = equal(b, total(b, index, 1), count)
    return b.mul(first, number(block)), b.select(is_last, size, b.mul(end, number(block)))


def add_call(
    module: ir.Module,
    name: str,
    item: ir.Function,
    share: Share,
    attributes: Sequence[str] = (),
) -> None:
    """Write `XLA_FFI_Error* name(XLA_FFI_CallFrame*)`, which XLA calls.

    Args:
        module: what it is written to.
        name: its name.
        item: a function of the common state and an item's number, which does that item.
        share: what cuts the work into items.
        attributes: names of the 64-bit integers that it is called with.

    Its two operands are float32 arrays, the first [b, h, w, cin]; so is its result,
    [..., cout].
    It checks nothing: who calls it knows what it takes, and that there is memory.
    """
    run = _add_run(module, name, item)
    let_go = _add_let_go(module)
    task, b = function(module, f"{name}.task", [PTR])
    b.call(run, [task.args[0]])
    b.call(let_go, [task.args[0]])
    b.ret_void()

    called, b = function(module, name, [PTR], PTR, public=True)
    (frame,) = called.args
    _answer_metadata(b, frame)
    api, context = (read(b, PTR, frame, FRAME[name]) for name in ("api", "context"))
    threads = variable(b, I64, number(1))
    error = _ask(b, api, API["threads"], context, threads)
    with b.if_then(b.icmp_unsigned("!=", error, NULL)):
        _ask(b, api, API["destroy_error"], error)  # no threads: alone, then
    v = _operands(b, frame) | _attributes(b, frame, attributes)
    v |= {"threads": maximum(b, b.load(threads, typ=I64), number(1))}
    v["parts"], v["groups"] = share(b, v)
    v["items"] = b.mul(v["parts"], v["groups"])
    helpers = b.sub(minimum(b, v["threads"], v["items"]), number(1))
    v |= {"next": number(0), "done": number(0), "holders": b.add(helpers, number(1))}

    malloc = declared(module, "malloc", [I64], PTR)
    work = b.call(malloc, [number(8 * len(WORK))])
    for i, name in enumerate(WORK):
        if name in v:
            b.store(v[name], byte(b, work, 8 * i))
    with for_range(b, 0, helpers):
        error = _ask(b, api, API["schedule"], context, task, work)
        with b.if_then(b.icmp_unsigned("!=", error, NULL)):
            _ask(b, api, API["destroy_error"], error)
            b.call(let_go, [work])  # no thread to be had: the others do its share
    b.call(run, [work])

    def others_are_busy() -> Value:
        done = b.load_atomic(_counter(b, work, "done"), "acquire", 8, typ=I64)
        return less(b, done, v["items"])

    with while_true(b, others_are_busy):
        b.call(declared(module, "sched_yield", [], I32), [])
    b.call(let_go, [work])
    b.ret(NULL)


def _operands(b: Builder, frame: Value) -> dict[str, Value]:
    arguments, results = (read(b, PTR, frame, FRAME[k]) for k in ("arguments", "results"))
    buffers = {
        "x": read(b, PTR, arguments, 0),
        "other": read(b, PTR, arguments, 8),
        "out": read(b, PTR, results, 0),
    }
    shapes = {k: read(b, PTR, buffer, BUFFER["dimensions"]) for k, buffer in buffers.items()}
    sides = {
        f"{k}_{side}": read(b, I64, shapes[k], 8 * i)
        for k in ("other", "out")
        for i, side in enumerate(("height", "width"), 1)
    }
    last = b.sub(read(b, I64, buffers["out"], BUFFER["rank"]), number(1))
    batch, height, width, cin = (read(b, I64, shapes["x"], 8 * i) for i in range(4))
    return {
        **{k: read(b, PTR, buffer, BUFFER["data"]) for k, buffer in buffers.items()},
        **sides,
        "batch": batch,
        "rows": b.mul(batch, height),
        "height": height,
        "width": width,
        "cin": cin,
        "cout": b.load(b.gep(shapes["out"], [last], source_etype=I64), typ=I64),
        "results": read(b, I64, shapes["out"], 0),
    }


def _attributes(b: Builder, frame: Value, names: Sequence[str]) -> dict[str, Value]:
    """The values of the call's attributes, which XLA sorts by their names."""
    attributes = read(b, PTR, frame, FRAME["attributes"])
    scalars = {name: read(b, PTR, attributes, 8 * i) for i, name in enumerate(sorted(names))}
    return {
        name: read(b, I64, read(b, PTR, scalar, SCALAR["value"]), 0)
        for name, scalar in scalars.items()
    }


def _answer_metadata(b: Builder, frame: Value) -> None:
    """When XLA registers a function, it asks it for the version of the interface."""
    extension = read(b, PTR, frame, FRAME["extension"])
    with b.if_then(b.icmp_unsigned("!=", extension, NULL)):
        type_ = read(b, I32, extension, EXTENSION["type"])
        with b.if_then(equal(b, type_, ir.Constant(I32, METADATA_EXTENSION))):
            metadata = read(b, PTR, extension, EXTENSION["metadata"])
            major, minor = FFI_VERSION
            for name, value in (("major", major), ("minor", minor), ("traits", 0)):
                b.store(ir.Constant(I32, value), byte(b, metadata, METADATA[name]))
            b.store(number(0), byte(b, metadata, METADATA["state"]))
            b.ret(NULL)


def _add_run(module: ir.Module, name: str, item: ir.Function) -> ir.Function:
    """Take items of the work until none is left."""
    run, b = function(module, f"{name}.run", [PTR])
    (work,) = run.args
    (items,) = fields(b, work, ["items"])
    taken = variable(b, I64)

    def one_is_left() -> Value:
        b.store(b.atomic_rmw("add", _counter(b, work, "next"), number(1), "monotonic"), taken)
        return less(b, b.load(taken, typ=I64), items)

    with while_true(b, one_is_left):
        b.call(item, [work, b.load(taken, typ=I64)])
        b.atomic_rmw("add", _counter(b, work, "done"), number(1), "release")
    b.ret_void()
    return run


def _add_let_go(module: ir.Module) -> ir.Function:
    """Free the common state if nobody else holds it."""
    if "let_go" in module.globals:
        return module.globals["let_go"]
    let_go, b = function(module, "let_go", [PTR])
    (work,) = let_go.args
    holders = b.atomic_rmw("sub", _counter(b, work, "holders"), number(1), "acq_rel")
    with b.if_then(equal(b, holders, 1)):
        release(b, work)
    b.ret_void()
    return let_go


def _counter(b: Builder, work: Value, name: str) -> Value:
    return byte(b, work, 8 * WORK.index(name))


def _ask(b: Builder, api: Value, offset: int, *rest: Value) -> Value:
    """Call a function of XLA's, whose arguments are {size, extension, rest...}.

    Returns:
        Its error, a pointer; null if there is none.
    """
    values = [number(8 * (2 + len(rest))), NULL, *rest]
    with b.goto_entry_block():
        place = b.alloca(I64, size=len(values))
    arguments = b.inttoptr(b.ptrtoint(place, I64), PTR)  # of no type, for any field
    for i, value in enumerate(values):
        b.store(value, byte(b, arguments, 8 * i))
    called = read(b, ir.FunctionType(PTR, [PTR]).as_pointer(), api, offset)
    return b.call(called, [arguments])
