"""The loop of a 3x3 convolution, which is that of its input's gradient too.

The sums of a block of pixels of a row stay in vector registers.
"""

from llvmlite import ir

from jaxunet.model.cpu.calls import fields, slice_of
from jaxunet.model.cpu.emit import (
    F32,
    I1,
    I64,
    PTR,
    Builder,
    Value,
    add_product,
    allocate,
    as_number,
    at,
    equal,
    for_range,
    function,
    less,
    load,
    maximum,
    minimum,
    number,
    release,
    spread,
    total,
    variable,
)
from jaxunet.model.cpu.registers import Blocks

PARTS_PER_THREAD = 4
"""A convolution is cut into so many pieces for each thread, as threads may come late."""


def _conv_block(
    module: ir.Module, lanes: int, pixels: int, left: bool, right: bool
) -> ir.Function:
    """y[p, o] = sum over i, j, c of x[i, p + j - 1, c] weights[i, j, c, o], for one block.

    `x` points to the block's first pixel in the first of `taps` rows, `weights` to that row's
    taps. At the `left` or `right` edge of the image, the zero beyond is left out.
    """
    if (name := f"conv_block_{pixels}{'_left' * left}{'_right' * right}") in module.globals:
        return module.globals[name]
    vector = ir.VectorType(F32, lanes)
    block, b = function(module, name, [PTR, PTR, PTR, I64, I64, I64, I64])
    x, weights, y, taps, width, cin, cout = block.args
    sums = [variable(b, vector) for _ in range(pixels)]
    with for_range(b, 0, taps) as i, for_range(b, 0, cin) as c:
        taps_of_row = [
            load(b, vector, at(b, weights, (i, 3, cin, lanes), (j, cin, lanes), (c, lanes)))
            for j in range(3)
        ]
        for p in range(left - 1, pixels + 1 - right):
            value = spread(b, load(b, F32, at(b, x, (i, width, cin), c, (p, cin))), vector)
            for j, weight in enumerate(taps_of_row):
                if 0 <= p - j + 1 < pixels:
                    add_product(b, sums[p - j + 1], value, weight)
    for p, result in enumerate(sums):
        b.store(b.load(result, typ=vector), at(b, y, (p, cout)), align=4)
    b.ret_void()
    return block


def conv_item(module: ir.Module, blocks: Blocks, *, turned: bool) -> ir.Function:
    """A part of the rows, one vector of output channels: its weights stay in the cache."""
    item, b = function(module, "turned_conv_item" if turned else "conv_item", [PTR, I64])
    work, index = item.args
    names = ["x", "other", "out", "parts", "rows", "height", "width", "cin", "cout"]
    x, kernel, y, parts, rows, height, width, cin, cout = fields(b, work, names)
    start, stop = slice_of(b, rows, b.urem(index, parts), parts)
    o = b.mul(b.udiv(index, parts), number(blocks.lanes))
    weights = allocate(b, b.mul(cin, number(9 * blocks.lanes)))
    _copy_weights(b, kernel, weights, blocks.lanes, (o, cin, cout), turned=turned)

    def row(pixels: int, r: Value) -> None:
        """The last block ends with the row, and may do again what the one before did."""
        h = b.urem(r, height)
        top = as_number(b, equal(b, h, 0))
        bottom = as_number(b, equal(b, h, b.sub(height, number(1))))
        taps = b.sub(number(3), b.add(top, bottom))
        last = b.sub(width, number(pixels))
        with for_range(b, 0, width, pixels) as q:
            p = minimum(b, q, last)
            arguments = [
                at(b, x, (total(b, r, top, -1), width, cin), (p, cin)),
                at(b, weights, (top, 3, cin, blocks.lanes)),
                at(b, y, (r, width, cout), (p, cout), o),
                *(taps, width, cin, cout),
            ]
            edges = equal(b, p, 0), equal(b, p, last)
            for left in (False, True):
                for right in (False, True):
                    block = _conv_block(module, blocks.lanes, pixels, left, right)
                    here = [
                        e if so else b.not_(e)
                        for e, so in zip(edges, (left, right), strict=True)
                    ]
                    with b.if_then(b.and_(*here)):
                        b.call(block, arguments)

    larger_fits: Value = ir.Constant(I1, False)
    for pixels in blocks.pixels:
        fits = b.not_(less(b, width, pixels))
        with b.if_then(b.and_(fits, b.not_(larger_fits))), for_range(b, start, stop) as r:
            row(pixels, r)
        larger_fits = fits
    release(b, weights)
    b.ret_void()
    return item


def _copy_weights(
    b: Builder,
    kernel: Value,
    weights: Value,
    lanes: int,
    sizes: tuple[Value, Value, Value],
    *,
    turned: bool,
) -> None:
    """weights[i, j, c, :] = kernel[i, j, c, o : o + lanes], next to each other.

    If `turned`, of the kernel turned by 180 degrees with its channels swapped, by which the
    output's gradient becomes the input's: kernel[2 - i, 2 - j, o : o + lanes, c].
    """
    o, cin, cout = sizes
    vector = ir.VectorType(F32, lanes)
    with for_range(b, 0, 9) as tap, for_range(b, 0, cin) as c:
        place = at(b, weights, (tap, cin, lanes), (c, lanes))
        if turned:
            source = at(b, kernel, (b.sub(number(8), tap), cin, cout), (o, cin), c)
            for lane in range(lanes):
                b.store(load(b, F32, at(b, source, (lane, cin))), at(b, place, lane))
        else:
            source = at(b, kernel, (tap, cin, cout), (c, cout), o)
            b.store(load(b, vector, source), place, align=4)


def share_conv(blocks: Blocks, b: Builder, v: dict[str, Value]) -> tuple[Value, Value]:
    vectors = b.udiv(v["cout"], number(blocks.lanes))
    parts = b.udiv(b.mul(v["threads"], number(PARTS_PER_THREAD)), vectors)
    return minimum(b, maximum(b, parts, number(1)), v["rows"]), vectors
