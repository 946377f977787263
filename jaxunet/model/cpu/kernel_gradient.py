"""The loop of the gradient of a 3x3 convolution's kernel.

The sums of the three taps of a row, for a block of channels, stay in vector registers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from llvmlite import ir

from jaxunet.model.cpu.calls import fields, slice_of, whole_blocks
from jaxunet.model.cpu.emit import (
    F32,
    I64,
    PTR,
    Builder,
    Value,
    add_product,
    allocate,
    at,
    clear,
    each_block,
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
from jaxunet.model.cpu.registers import Blocks

NEAR_CHANNELS = 32
"""Of more channels, the kernel's gradient copies blocks together before it uses them."""
STRIP_PIXELS = 256
"""Of about so many pixels, the share in the kernel's gradient is summed up, then added."""
KERNEL_GRADIENT_ITEMS = 16
"""The kernel's gradient is cut into about so many pieces, whoever computes them."""


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


def kernel_gradient_item(module: ir.Module, blocks: Blocks) -> ir.Function:
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
    first, end = whole_blocks(b, cin, b.urem(index, groups), groups, blocks.channels)
    out = at(b, out, (part, 9, cin, cout))
    with for_range(b, 0, 9) as tap:
        place = at(b, out, (tap, cin, cout), (first, cout))
        clear(b, place, b.mul(b.sub(end, first), cout))

    strip = maximum(b, b.udiv(number(STRIP_PIXELS), width), number(1))
    pixels = b.mul(total(b, strip, 2), width)
    far_x, far_dy = (less(b, number(NEAR_CHANNELS), c) for c in (cin, cout))
    x_copy, dy_copy = (
        allocate(b, b.select(far, b.mul(pixels, channels), number(0)))
        for far, channels in ((far_x, b.sub(end, first)), (far_dy, cout))
    )

    def each_block_of_channels(act: Callable[[Value, int], None]) -> None:
        each_block(b, first, end, (blocks.channels, 1), act)

    def strip_of_rows(low: Value, high: Value, image: Value) -> None:
        image_end = b.add(image, height)
        top = maximum(b, total(b, low, -1), image)
        bottom = minimum(b, total(b, high, 1), image_end)
        size = b.mul(b.sub(bottom, top), width)
        xs = _Copied(x, x_copy, far_x, top, size, width, cin, first)
        size = b.mul(b.sub(high, low), width)
        dys = _Copied(dy, dy_copy, far_dy, low, size, width, cout, number(0))
        with b.if_then(far_x):
            each_block_of_channels(partial(xs.fill, b))
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

            each_block_of_channels(act)

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


def share_kernel_gradient(
    blocks: Blocks, b: Builder, v: dict[str, Value]
) -> tuple[Value, Value]:
    """A part for each result that is asked for; if those are few, input channels apart too."""
    parts = v["results"]
    groups = b.udiv(total(b, parts, KERNEL_GRADIENT_ITEMS - 1), parts)
    most = maximum(b, b.udiv(v["cin"], number(blocks.channels)), number(1))
    return parts, minimum(b, groups, most)
