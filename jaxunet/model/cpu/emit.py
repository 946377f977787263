"""A few words more for writing LLVM's code with llvmlite: loops, places in memory, sums."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from llvmlite import ir

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
F32, PTR, VOID = ir.FloatType(), ir.PointerType(), ir.VoidType()
NULL = ir.Constant(PTR, None)

Builder: TypeAlias = ir.IRBuilder
Value: TypeAlias = ir.Value
Number: TypeAlias = Value | int
Term: TypeAlias = Number | tuple[Number, ...]


def number(value: Number) -> Value:
    """A 64-bit integer, where it isn't a value yet."""
    return ir.Constant(I64, value) if isinstance(value, int) else value


def function(
    module: ir.Module,
    name: str,
    arguments: Sequence[ir.Type],
    result: ir.Type = VOID,
    *,
    public: bool = False,
) -> tuple[ir.Function, Builder]:
    """A new function and what writes its code; seen from outside only if `public`."""
    new = ir.Function(module, ir.FunctionType(result, arguments), name)
    if not public:
        new.linkage = "internal"
        new.attributes.add("noinline")
    return new, Builder(new.append_basic_block("entry"))


def declared(
    module: ir.Module, name: str, arguments: Sequence[ir.Type], result: ir.Type
) -> ir.Function:
    """A function of the C library or of LLVM itself, by its name."""
    if name not in module.globals:
        ir.Function(module, ir.FunctionType(result, arguments), name)
    return module.globals[name]


def allocate(b: Builder, count: Value) -> Value:
    """Memory for so many float32 values, from the start of a cache line on: a vector that
    lies across two takes twice the time. To be given to `release`."""
    line = 64
    size = b.and_(total(b, (count, 4), line - 1), number(-line))
    aligned_alloc = declared(b.module, "aligned_alloc", [I64, I64], PTR)
    return b.call(aligned_alloc, [number(line), size])


def release(b: Builder, memory: Value) -> None:
    """Free what `allocate` or the C library's `malloc` gave."""
    b.call(declared(b.module, "free", [PTR], VOID), [memory])


@contextmanager
def for_range(b: Builder, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
    """`for i in range(start, stop, step)`, step > 0: what is written inside is its body."""
    before = b.block
    head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(number(start), before)
    b.cbranch(b.icmp_signed("<", i, number(stop)), body, after)
    b.position_at_end(body)
    yield i
    i.add_incoming(b.add(i, number(step)), b.block)
    b.branch(head)
    b.position_at_end(after)


@contextmanager
def while_true(b: Builder, condition: Callable[[], Value]) -> Iterator[None]:
    """`while condition():`; `condition` writes the code that is run before each turn."""
    head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    b.cbranch(condition(), body, after)
    b.position_at_end(body)
    yield
    b.branch(head)
    b.position_at_end(after)


def each_block(
    b: Builder,
    first: Value,
    end: Value,
    sizes: Iterable[int],
    act: Callable[[Value, int], None],
) -> None:
    """Cut `first` to `end` into blocks, each of the first of `sizes` that fits.

    Args:
        sizes: from large to small; the last one must divide whatever is left.
        act: writes the code for a block: where it begins, its size.
    """
    i = variable(b, I64, first)
    for size in sizes:

        def fits(size: int = size) -> Value:
            return b.not_(less(b, end, total(b, b.load(i, typ=I64), size)))

        with while_true(b, fits):
            now = b.load(i, typ=I64)
            act(now, size)
            b.store(b.add(now, number(size)), i)


def clear(b: Builder, place: Value, count: Value) -> None:
    """Set so many float32 values to zero."""
    memset = declared(b.module, "llvm.memset.p0.i64", [PTR, I8, I64, I1], VOID)
    size = b.mul(count, number(4))
    b.call(memset, [place, ir.Constant(I8, 0), size, ir.Constant(I1, False)])


def variable(b: Builder, type_: ir.Type, value: Value | None = None) -> Value:
    """A local variable, which LLVM keeps in a register if it can; zero if no `value`."""
    with b.goto_entry_block():
        place = b.alloca(type_)
    b.store(ir.Constant(type_, None) if value is None else value, place)
    return place


def total(b: Builder, *terms: Term) -> Value:
    """The sum of integers, each of them a number or a tuple, which stands for its product."""
    result: Value | None = None
    for term in terms:
        factors = [number(factor) for factor in (term if isinstance(term, tuple) else (term,))]
        product = factors[0]
        for factor in factors[1:]:
            product = b.mul(product, factor)
        result = product if result is None else b.add(result, product)
    assert result is not None
    return result


def at(b: Builder, base: Value, *terms: Term) -> Value:
    """The place so many float32 values after `base`; `terms` as for `total`."""
    return b.gep(base, [total(b, *terms)], source_etype=F32)


def load(b: Builder, type_: ir.Type, place: Value) -> Value:
    """A float32 or a vector of them, aligned as a float32 is."""
    return b.load(place, align=4, typ=type_)


def read(b: Builder, type_: ir.Type, base: Value, offset: int) -> Value:
    """What stands `offset` bytes after `base`."""
    return b.load(byte(b, base, offset), typ=type_)


def byte(b: Builder, base: Value, offset: int) -> Value:
    """The place `offset` bytes after `base`."""
    return b.gep(base, [number(offset)], source_etype=I8)


def spread(b: Builder, value: Value, vector: ir.VectorType) -> Value:
    """A vector of one value many times."""
    undefined = ir.Constant(vector, ir.Undefined)
    one = b.insert_element(undefined, value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), None)
    return b.shuffle_vector(one, undefined, zeros)


def add_product(b: Builder, place: Value, left: Value, right: Value) -> None:
    """Variable += left * right, rounded once; vectors of float32."""
    vector = left.type
    name = f"llvm.fma.v{vector.count}f32"
    fma = declared(b.module, name, [vector] * 3, vector)
    b.store(b.call(fma, [left, right, b.load(place, typ=vector)]), place)


def equal(b: Builder, left: Value, right: Number) -> Value:
    return b.icmp_signed("==", left, number(right))


def less(b: Builder, left: Value, right: Number) -> Value:
    return b.icmp_signed("<", left, number(right))


def minimum(b: Builder, left: Value, right: Value) -> Value:
    return b.select(less(b, left, right), left, right)


def maximum(b: Builder, left: Value, right: Value) -> Value:
    return b.select(less(b, left, right), right, left)


def as_number(b: Builder, truth: Value) -> Value:
    """1 if true, 0 if false."""
    return b.zext(truth, I64)
