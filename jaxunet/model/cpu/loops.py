"""The two loops: a 3x3 convolution, and the gradient of its kernel.

Both keep the sums of a block in vector registers and go through memory with every value that
is loaded meeting three others, the taps of a row: then the multipliers are busy and loading
keeps up. (The idea of Georganas et al. 2018, "Anatomy of high-performance deep learning
convolutions on SIMD architectures", arXiv:1808.05567.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from llvmlite import ir

from jaxunet.model.cpu.calls import add_call, fields, slice_of
from jaxunet.model.cpu.emit import (
    F32,
    I1,
    I8,
    I64,
    PTR,
    VOID,
    Builder,
    Value,
    add_product,
    allocate,
    as_number,
    at,
    declared,
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
    while_true,
)

CONV = "jaxunet.conv3x3.1"
INPUT_GRADIENT = "jaxunet.conv3x3_input_gradient.1"
KERNEL_GRADIENT = "jaxunet.conv3x3_kernel_gradient.1"
"""Names of the functions; the number changes with what they take and give."""

NEAR_CHANNELS = 32
"""Of more channels, the kernel's gradient copies blocks together before it uses them."""
STRIP_PIXELS = 256
"""Of about so many pixels, the share in the kernel's gradient is summed up, then added."""
PARTS_PER_THREAD = 4
"""A convolution is cut into so many pieces for each thread, as threads may come late."""
KERNEL_GRADIENT_ITEMS = 16
"""The kernel's gradient is cut into about so many pieces, whoever computes them."""


class Blocks(NamedTuple):
    """What the loops hold in registers at a time."""

    lanes: int  # output channels: a vector
    pixels: tuple[int, ...]  # of a row, in the convolution: the largest that fits into the row
    channels: int  # input channels, in the kernel's gradient

    def target(self, name: str) -> str:
        """What XLA knows a function by. A program made for other blocks must not find it."""
        return f"{name}.{self.lanes}"


def build(blocks: Blocks) -> ir.Module:
    """LLVM's code of both loops, as functions that XLA can call."""
    module = ir.Module("jaxunet")
    conv, input_gradient = (_conv_item(module, blocks, turned=t) for t in (False, True))
    share = partial(_share_conv, blocks)
    add_call(module, blocks.target(CONV), conv, share)
    add_call(module, blocks.target(INPUT_GRADIENT), input_gradient, share)
    kernel_gradient = _kernel_gradient_item(module, blocks)
    share = partial(_share_kernel_gradient, blocks)
    add_call(module, blocks.target(KERNEL_GRADIENT), kernel_gradient, share)
    return module


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


def _conv_item(module: ir.Module, blocks: Blocks, *, turned: bool) -> ir.Function:
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


def _share_conv(blocks: Blocks, b: Builder, v: dict[str, Value]) -> tuple[Value, Value]:
    vectors = b.udiv(v["cout"], number(blocks.lanes))
    parts = b.udiv(b.mul(v["threads"], number(PARTS_PER_THREAD)), vectors)
    return minimum(b, maximum(b, parts, number(1)), v["rows"]), vectors


def _kernel_gradient_block(module: ir.Module, lanes: int, channels: int) -> ir.Function:
    """out[j, c, o] += sum over rows and p of x[row, p + j - 1, c] dy[row, p, o], for one block.

    It goes by the pixels of x, each of which meets three of dy, two at the edges. From
    one pixel to the next are `x_pixel` values of x, `dy_pixel` of dy.
    """
    if (name := f"kernel_gradient_block_{channels}") in module.globals:
        return module.globals[name]
    vector = ir.VectorType(F32, lanes)
    block, b = function(module, name, [PTR, PTR, PTR, *[I64] * 6])
    x, dy, out, rows, width, x_pixel, dy_pixel, cin, cout = block.args
    sums = [[variable(b, vector) for _ in range(channels)] for _ in range(3)]
    last = b.sub(width, number(1))

    def pixel(r: Value, p: Value, taps: Sequence[int]) -> None:
        """What x[r, p] adds to the sums of `taps`: tap j is of the output at p + 1 - j."""
        gradients = [
            load(b, vector, at(b, dy, (r, width, dy_pixel), (p, dy_pixel), (1 - j, dy_pixel)))
            for j in taps
        ]
        for c in range(channels):
            place = at(b, x, (r, width, x_pixel), (p, x_pixel), c)
            value = spread(b, load(b, F32, place), vector)
            for j, gradient in zip(taps, gradients, strict=True):
                add_product(b, sums[j][c], value, gradient)

    with for_range(b, 0, rows) as r:
        pixel(r, number(0), (0, 1))
        with for_range(b, 1, last) as p:
            pixel(r, p, (0, 1, 2))
        pixel(r, last, (1, 2))
    for j in range(3):
        for c in range(channels):
            place = at(b, out, (j, cin, cout), (c, cout))
            result = b.fadd(load(b, vector, place), b.load(sums[j][c], typ=vector))
            b.store(result, place, align=4)
    b.ret_void()
    return block


def _whole_blocks(
    b: Builder, size: Value, index: Value, count: Value, block: int
) -> tuple[Value, Value]:
    """A slice in whole blocks, but for the last, which ends with the whole."""
    first, end = slice_of(b, b.udiv(size, number(block)), index, count)
    is_last = equal(b, total(b, index, 1), count)
    return b.mul(first, number(block)), b.select(is_last, size, b.mul(end, number(block)))


class _Copied(NamedTuple):
    """Some rows of an array [.., width, channels]: there, or copied block by block."""

    values: Value  # of the whole array
    copy: Value
    is_copied: Value
    first_row: Value
    pixels: Value  # in the rows that are copied
    width: Value
    channels: Value  # of the whole array
    first: Value  # of the channels

    def _there(self, b: Builder, row: Value, c: Value) -> Value:
        return at(b, self.values, (row, self.width, self.channels), c)

    def _copied(self, b: Builder, row: Value, c: Value, size: int) -> Value:
        row = total(b, row, (self.first_row, -1))
        c = total(b, c, (self.first, -1))
        return at(b, self.copy, (c, self.pixels), (row, self.width, size))

    def block(self, b: Builder, row: Value, c: Value, size: int) -> tuple[Value, Value]:
        """Where channels from `c` begin in `row`, and how far it is from pixel to pixel."""
        return (
            b.select(self.is_copied, self._copied(b, row, c, size), self._there(b, row, c)),
            b.select(self.is_copied, number(size), self.channels),
        )

    def fill(self, b: Builder, c: Value, size: int) -> None:
        """Copy the block of channels from `c`."""
        vector = ir.VectorType(F32, size)
        source = self._there(b, self.first_row, c)
        target = self._copied(b, self.first_row, c, size)
        with for_range(b, 0, self.pixels) as p:
            value = load(b, vector, at(b, source, (p, self.channels)))
            b.store(value, at(b, target, (p, size)), align=4)


def _kernel_gradient_item(module: ir.Module, blocks: Blocks) -> ir.Function:
    """A part of the rows, a group of input channels.

    By strips of an image's rows: few enough pixels for a block's share of them to stay in the
    nearest cache, enough for its sums to stay in registers for a while. Where pixels lie far
    apart, blocks are copied first: caches have few places for values at such distances.
    """
    item, b = function(module, "kernel_gradient_item", [PTR, I64])
    work, index = item.args
    names = ["x", "other", "out", "parts", "groups", "rows", "height", "width", "cin", "cout"]
    x, dy, out, parts, groups, rows, height, width, cin, cout = fields(b, work, names)
    part = b.udiv(index, groups)
    start, stop = slice_of(b, rows, part, parts)
    first, end = _whole_blocks(b, cin, b.urem(index, groups), groups, blocks.channels)
    out = at(b, out, (part, 9, cin, cout))
    with for_range(b, 0, 9) as tap:
        memset = declared(module, "llvm.memset.p0.i64", [PTR, I8, I64, I1], VOID)
        size = b.mul(b.mul(b.sub(end, first), cout), number(4))
        place = at(b, out, (tap, cin, cout), (first, cout))
        b.call(memset, [place, ir.Constant(I8, 0), size, ir.Constant(I1, False)])

    strip = maximum(b, b.udiv(number(STRIP_PIXELS), width), number(1))
    pixels = b.mul(total(b, strip, 2), width)
    far_x, far_dy = (less(b, number(NEAR_CHANNELS), c) for c in (cin, cout))
    x_copy, dy_copy = (
        allocate(b, b.select(far, b.mul(pixels, channels), number(0)))
        for far, channels in ((far_x, b.sub(end, first)), (far_dy, cout))
    )

    def each_block(act: Callable[[Value, int], None]) -> None:
        """`act` on each block of input channels: where it begins, its size."""
        c = variable(b, I64, first)
        for channels in (blocks.channels, 1):

            def are_left(channels: int = channels) -> Value:
                return b.not_(less(b, end, total(b, b.load(c, typ=I64), channels)))

            with while_true(b, are_left):
                now = b.load(c, typ=I64)
                act(now, channels)
                b.store(b.add(now, number(channels)), c)

    def strip_of_rows(low: Value, high: Value, image: Value) -> None:
        image_end = b.add(image, height)
        top = maximum(b, total(b, low, -1), image)
        bottom = minimum(b, total(b, high, 1), image_end)
        size = b.mul(b.sub(bottom, top), width)
        xs = _Copied(x, x_copy, far_x, top, size, width, cin, first)
        size = b.mul(b.sub(high, low), width)
        dys = _Copied(dy, dy_copy, far_dy, low, size, width, cout, number(0))
        with b.if_then(far_x):
            each_block(partial(xs.fill, b))
        with b.if_then(far_dy), for_range(b, 0, cout, blocks.lanes) as o:
            dys.fill(b, o, blocks.lanes)
        with for_range(b, 0, 3) as i:
            # dy's row meets x's row i - 1 further down, if that is in the image.
            from_ = maximum(b, total(b, low, i, -1), top)
            to = minimum(b, total(b, high, i, -1), bottom)

            def act(c: Value, channels: int) -> None:
                block = _kernel_gradient_block(module, blocks.lanes, channels)
                x_at, x_pixel = xs.block(b, from_, c, channels)
                with for_range(b, 0, cout, blocks.lanes) as o:
                    row = total(b, from_, 1, (i, -1))
                    dy_at, dy_pixel = dys.block(b, row, o, blocks.lanes)
                    out_at = at(b, out, (i, 3, cin, cout), (c, cout), o)
                    sizes = [b.sub(to, from_), width, x_pixel, dy_pixel, cin, cout]
                    b.call(block, [x_at, dy_at, out_at, *sizes])

            each_block(act)

    next_row = variable(b, I64, start)
    with while_true(b, lambda: less(b, b.load(next_row, typ=I64), stop)):
        low = b.load(next_row, typ=I64)
        image = b.sub(low, b.urem(low, height))
        high = minimum(b, minimum(b, b.add(low, strip), stop), b.add(image, height))
        strip_of_rows(low, high, image)
        b.store(high, next_row)
    for copy in (x_copy, dy_copy):
        release(b, copy)
    b.ret_void()
    return item


def _share_kernel_gradient(
    blocks: Blocks, b: Builder, v: dict[str, Value]
) -> tuple[Value, Value]:
    """A part for each result that is asked for; if those are few, input channels apart too."""
    parts = v["results"]
    groups = b.udiv(total(b, parts, KERNEL_GRADIENT_ITEMS - 1), parts)
    most = maximum(b, b.udiv(v["cin"], number(blocks.channels)), number(1))
    return parts, minimum(b, groups, most)
