"""The loops of the depthwise convolution: product, gradient of the input, of the kernel.

Channels lie next to each other in memory and don't meet, so that all works on vectors of
them. Sizes, stride (1 or 2) and padding are known when XLA calls. Sums of a few vectors stay
in registers; each multiplication loads both factors, which is enough, as there are few for
each value that comes from memory.
"""

from collections.abc import Callable

from llvmlite import ir

from jaxunet.model.cpu.calls import fields, slice_of, whole_blocks
from jaxunet.model.cpu.emit import (
    F32,
    I64,
    PTR,
    Builder,
    Value,
    add_product,
    at,
    clear,
    each_block,
    for_range,
    function,
    load,
    maximum,
    minimum,
    number,
    total,
    variable,
)
from jaxunet.model.cpu.registers import Blocks

VECTORS = 4
"""So many vectors of channels at a time, so that no addition waits for the one before."""
PARTS_PER_THREAD = 4
"""The rows are cut into so many pieces for each thread, as threads may come late."""
KERNEL_GRADIENT_ITEMS = 16
"""The kernel's gradient is cut into about so many pieces, whoever computes them."""


def _taps(
    b: Builder, place: Value, side: Value, size: Value, stride: Value, before: Value
) -> tuple[Value, Value, Value]:
    """What the result at `place` of an axis meets: tap by tap, one further in the source.

    Args:
        side: of the source.
        before: zeros before it.

    Returns:
        The first place in the source, its tap, and how many there are; none if below 1.
    """
    start = b.sub(b.mul(place, stride), before)
    first = maximum(b, number(0), b.neg(start))
    end = minimum(b, size, b.sub(side, start))
    return b.add(start, first), first, b.sub(end, first)


def _taps_back(
    b: Builder, place: Value, side: Value, size: Value, stride: Value, before: Value
) -> tuple[Value, Value, Value]:
    """As `_taps` for the input's gradient: every `stride`-th tap, one less far each time."""
    shift = b.sub(stride, number(1))  # as a stride of 1 or 2
    place = b.add(place, before)
    tap = b.and_(place, shift)
    last = b.ashr(place, shift)
    beyond = maximum(b, number(0), total(b, last, (side, -1), 1))
    end = minimum(b, total(b, last, 1), b.ashr(b.add(b.sub(size, tap), shift), shift))
    return b.sub(last, beyond), total(b, tap, (beyond, stride)), b.sub(end, beyond)


def _row(module: ir.Module, lanes: int, vectors: int, *, back: bool) -> ir.Function:
    """A row of the result of a block of channels; of the input's gradient if `back`.

    `source` points to the first of `rows` rows that are met, `kernel` to the taps of that one.
    """
    name = f"depthwise_row_{lanes}_{vectors}{'_back' * back}"
    if name in module.globals:
        return module.globals[name]
    vector = ir.VectorType(F32, lanes)
    row, b = function(module, name, [*[PTR] * 3, *[I64] * 7])
    source, kernel, out, rows, side, places, channels, size, stride, left = row.args
    sign, step = (-1, stride) if back else (1, number(1))
    with for_range(b, 0, places) as p:
        taps = _taps_back if back else _taps
        first, tap, count = taps(b, p, side, size, stride, left)
        sums = [variable(b, vector) for _ in range(vectors)]
        with for_range(b, 0, rows) as i, for_range(b, 0, count) as j:
            column = total(b, first, (j, sign))
            value = at(b, source, (i, sign, side, channels), (column, channels))
            column = total(b, tap, (j, step))
            weight = at(b, kernel, (i, step, size, channels), (column, channels))
            for v, result in enumerate(sums):
                pair = (load(b, vector, at(b, base, v * lanes)) for base in (value, weight))
                add_product(b, result, *pair)
        for v, result in enumerate(sums):
            place = at(b, out, (p, channels), v * lanes)
            b.store(b.load(result, typ=vector), place, align=4)
    b.ret_void()
    return row


def depthwise_item(module: ir.Module, blocks: Blocks, *, back: bool) -> ir.Function:
    """A part of the result's rows."""
    item, b = function(module, f"depthwise{'_back' * back}_item", [PTR, I64])
    work, index = item.args
    names = ["x", "other", "out", "parts", "batch", "height", "width", "cin", "out_height"]
    names += ["out_width", "size", "stride", "top", "left"]
    found = fields(b, work, names)
    x, kernel, out, parts, batch, height, width, channels, out_height = found[:9]
    out_width, size, stride, top, left = found[9:]
    start, stop = slice_of(b, b.mul(batch, out_height), index, parts)
    with for_range(b, start, stop) as r:
        h, image = b.urem(r, out_height), b.udiv(r, out_height)
        taps = _taps_back if back else _taps
        first, tap, count = taps(b, h, height, size, stride, top)
        above = total(b, (image, height), first)

        def act(c: Value, lanes: int, vectors: int) -> None:
            arguments = [
                at(b, x, (above, width, channels), c),
                at(b, kernel, (tap, size, channels), c),
                at(b, out, (r, out_width, channels), c),
                *(count, width, out_width, channels, size, stride, left),
            ]
            b.call(_row(module, lanes, vectors, back=back), arguments)

        _channel_blocks(b, number(0), channels, blocks.lanes, act)
    b.ret_void()
    return item


def _kernel_gradient_row(module: ir.Module, lanes: int, vectors: int) -> ir.Function:
    """What a row of dy adds to the sums of a block of channels.

    `x` points to the first of `rows` rows that it met, `out` to the taps of that one.
    """
    name = f"depthwise_kernel_gradient_row_{lanes}_{vectors}"
    if name in module.globals:
        return module.globals[name]
    vector = ir.VectorType(F32, lanes)
    row, b = function(module, name, [*[PTR] * 3, *[I64] * 7])
    x, dy, out, rows, side, places, channels, size, stride, left = row.args
    shift = b.sub(stride, number(1))  # as a stride of 1 or 2
    with for_range(b, 0, rows) as i, for_range(b, 0, size) as j:
        # Places whose tap j is inside the row: 0 <= p * stride - left + j < side.
        before = b.sub(left, j)
        first = b.ashr(b.add(maximum(b, before, number(0)), shift), shift)
        end = total(b, b.ashr(total(b, side, before, -1), shift), 1)
        sums_at = at(b, out, (i, size, channels), (j, channels))
        sums = [
            variable(b, vector, load(b, vector, at(b, sums_at, v * lanes)))
            for v in range(vectors)
        ]
        with for_range(b, first, minimum(b, end, places)) as p:
            column = b.sub(b.mul(p, stride), before)
            value = at(b, x, (i, side, channels), (column, channels))
            gradient = at(b, dy, (p, channels))
            for v, result in enumerate(sums):
                pair = (load(b, vector, at(b, base, v * lanes)) for base in (value, gradient))
                add_product(b, result, *pair)
        for v, result in enumerate(sums):
            b.store(b.load(result, typ=vector), at(b, sums_at, v * lanes), align=4)
    b.ret_void()
    return row


def depthwise_kernel_gradient_item(module: ir.Module, blocks: Blocks) -> ir.Function:
    """A part of the rows of dy, a group of channels."""
    item, b = function(module, "depthwise_kernel_gradient_item", [PTR, I64])
    work, index = item.args
    names = ["x", "other", "out", "parts", "groups", "batch", "height", "width", "cin"]
    names += ["other_height", "other_width", "size", "stride", "top", "left"]
    found = fields(b, work, names)
    x, dy, out, parts, groups, batch, height, width, channels = found[:9]
    dy_height, dy_width, size, stride, top, left = found[9:]
    part = b.udiv(index, groups)
    start, stop = slice_of(b, b.mul(batch, dy_height), part, parts)
    block = VECTORS * blocks.lanes
    group = whole_blocks(b, channels, b.urem(index, groups), groups, block)
    out = at(b, out, (part, size, size, channels))
    with for_range(b, 0, b.mul(size, size)) as tap:
        clear(b, at(b, out, (tap, channels), group[0]), b.sub(group[1], group[0]))
    with for_range(b, start, stop) as r:
        h, image = b.urem(r, dy_height), b.udiv(r, dy_height)
        first, tap, count = _taps(b, h, height, size, stride, top)
        above = total(b, (image, height), first)

        def act(c: Value, lanes: int, vectors: int) -> None:
            arguments = [
                at(b, x, (above, width, channels), c),
                at(b, dy, (r, dy_width, channels), c),
                at(b, out, (tap, size, channels), c),
                *(count, width, dy_width, channels, size, stride, left),
            ]
            b.call(_kernel_gradient_row(module, lanes, vectors), arguments)

        _channel_blocks(b, *group, blocks.lanes, act)
    b.ret_void()
    return item


def _channel_blocks(
    b: Builder,
    first: Value,
    end: Value,
    lanes: int,
    act: Callable[[Value, int, int], None],
) -> None:
    """`act` on each block of channels: where it begins, its lanes and vectors."""
    shapes = {VECTORS * lanes: (lanes, VECTORS), lanes: (lanes, 1), 1: (1, 1)}
    each_block(b, first, end, shapes, lambda c, size: act(c, *shapes[size]))


def share_depthwise(b: Builder, v: dict[str, Value]) -> tuple[Value, Value]:
    parts = b.mul(v["threads"], number(PARTS_PER_THREAD))
    return minimum(b, parts, b.mul(v["batch"], v["out_height"])), number(1)


def share_depthwise_kernel_gradient(
    blocks: Blocks, b: Builder, v: dict[str, Value]
) -> tuple[Value, Value]:
    """A part for each result that is asked for; if those are few, channels apart too."""
    parts = v["results"]
    groups = b.udiv(total(b, parts, KERNEL_GRADIENT_ITEMS - 1), parts)
    most = b.udiv(v["cin"], number(VECTORS * blocks.lanes))
    return parts, minimum(b, groups, maximum(b, most, number(1)))
