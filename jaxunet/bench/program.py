"""What an optimised program says of itself: its operations, their estimated costs, collectives.

XLA's compiler for TPU leaves the cycles that it estimates in each operation, the one for GPU
microseconds (`xla_gpu_collect_cost_model_stats`). Convolutions and matrix products on a GPU
are libraries' or tuned on the card: they have no estimate that holds, but their size.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = (
    *("convolution", "copy and relayout", "reduction", "element by element", "optimizer"),
    "collective",
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_MOVES = frozenset(
    (
        *("bitcast", "broadcast", "concatenate", "constant", "copy", "copy-done", "copy-start"),
        *("dynamic-slice", "dynamic-update-slice", "get-tuple-element", "pad", "parameter"),
        *("reshape", "reverse", "slice", "slice-done", "slice-start", "transpose", "tuple"),
    )
)
_SUMS = frozenset(("reduce", "reduce-window", "select-and-scatter"))
_PRODUCTS = frozenset(("convolution", "dot"))

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w\-]*)\(([^()]*)\)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_LAYER = re.compile(r"(?:encoder|decoder)(?:/level_\d+(?:/(?:conv|norm)_\d|/up)?)?|head")


@dataclass(frozen=True)
class Operation:
    """One operation of a program, with what is fused into it.

    Attributes:
        kind: one of `KINDS`.
        layer: the model's, as in the tree of its parameters; empty outside the model.
        backward: whether it belongs to a gradient.
        shape: of its result, in XLA's words.
        cycles: estimated by a TPU's compiler, or None.
        microseconds: estimated by a GPU's, or None.
        moved_bytes: those of its operands and result.
        flops: of a product without a TPU's estimate, else 0; a multiplication and its addition
            count 2.
        operands: the type of what such a product multiplies, in XLA's words.
        opcode: XLA's; a fusion has its own.
    """

    name: str
    kind: str
    layer: str
    backward: bool
    shape: str
    cycles: int | None = None
    microseconds: float | None = None
    moved_bytes: int = 0
    flops: float = 0
    operands: str = ""
    opcode: str = ""


@dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    line: str
    called: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.called = re.findall(r"calls=%?([\w.\-]+)", self.line)

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""


Computations = dict[str, dict[str, _Instruction]]


def operations(program: str) -> list[Operation]:
    """All products and all operations with a cost, of the text of an optimised program."""
    return [
        each
        for each, is_fused in _operations(program)
        if (
            each.kind == "convolution"
            or each.cycles is not None
            or each.microseconds is not None
        )
        and not (is_fused and each.flops)  # a product's size is its fusion's
    ]


def by_name(program: str) -> dict[str, Operation]:
    """All operations, fused ones too, by name; also in the letters that a GPU calls them in."""
    found: dict[str, Operation] = {}
    for each, _ in _operations(program):
        found[each.name] = each
        found.setdefault(re.sub(r"[.\-]", "_", each.name), each)
    return found


def _operations(program: str) -> Iterator[tuple[Operation, bool]]:
    """Each operation, and whether it is fused into another."""
    computations = _parse(program)
    fused = {
        name for around in computations.values() for i in around.values() for name in i.called
    }
    for name, around in computations.items():
        for instruction in around.values():
            yield _operation(instruction, around, computations), name in fused


def collectives(program: str) -> dict[str, dict[str, int]]:
    """By kind, how many a device starts, and the bytes of their results on it."""
    found: dict[str, dict[str, int]] = {}
    for instructions in _parse(program).values():
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                arrays = list(_arrays(instruction.shape))
                if instruction.opcode == f"{kind}-start" and kind != "all-reduce":
                    arrays = arrays[len(arrays) // 2 :]  # its operands come first
                entry = found.setdefault(kind, {"count": 0, "bytes": 0})
                entry["count"] += 1
                entry["bytes"] += sum(size for _, size in arrays)
    return found


def _parse(program: str) -> Computations:
    computations: Computations = {}
    current: dict[str, _Instruction] | None = None
    for line in program.splitlines():
        if current is not None and (found := _INSTRUCTION.match(line)):
            name, shape, opcode, operands = found.groups()
            names = re.findall(r"%([\w.\-]+)", operands)
            current[name] = _Instruction(name, shape, opcode, names, line)
        elif found := _COMPUTATION.match(line):
            current = computations.setdefault(found[1], {})
        elif line.startswith("}"):
            current = None
    return computations


def _operation(
    instruction: _Instruction, around: dict[str, _Instruction], computations: Computations
) -> Operation:
    line = instruction.line
    cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
    # The second figure, of the same name, is a bound ("speed of light").
    microseconds = re.search(r'"exec_time_us":([\d.e+-]+)', line)
    inside = list(_inside(instruction, computations))
    parts = [*inside, (instruction, around)]
    product = next((part for part in parts if _is_product(part[0])), None)
    source = instruction.source
    if product is not None and product[0].source:
        source = product[0].source
    for other, _ in inside:
        source = source or other.source
    for operand in instruction.operands:  # a copy has no name of its own
        source = source or (around[operand].source if operand in around else "")
    size = (0.0, "")
    if cycles is None and product is not None:
        size = _size_of_product(*product)
    layer = _LAYER.search(source)
    return Operation(
        instruction.name,
        _kind(instruction, {i.opcode for i, _ in inside}, product is not None, source),
        layer[0] if layer else "",
        "transpose(" in source,
        instruction.shape,
        int(cycles[1]) if cycles else None,
        float(microseconds[1]) if microseconds else None,
        _moved_bytes(instruction, around),
        *size,
        instruction.opcode,
    )


def _is_product(instruction: _Instruction) -> bool:
    # A CPU's are jaxunet's own, or oneDNN's.
    libraries = r'custom_call_target="(__cudnn\$conv|__cublas\$|__onednn\$|jaxunet\.)'
    return instruction.opcode in _PRODUCTS or re.search(libraries, instruction.line) is not None


def _inside(
    instruction: _Instruction, computations: Computations
) -> Iterator[tuple[_Instruction, dict[str, _Instruction]]]:
    """All that is fused into the instruction, each with those around it."""
    for name in instruction.called:
        around = computations.get(name, {})
        for other in around.values():
            yield other, around
            yield from _inside(other, computations)


def _kind(instruction: _Instruction, opcodes: set[str], product: bool, source: str) -> str:
    opcodes = opcodes or {instruction.opcode}
    if instruction.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return "collective"
    if product:
        return "convolution"
    if "/optimizer/" in source:
        return "optimizer"
    if opcodes <= _MOVES:
        return "copy and relayout"
    return "reduction" if opcodes & _SUMS else "element by element"


def _arrays(shape: str) -> Iterator[tuple[int, int]]:
    """Elements and bytes of each array of a shape."""
    for kind, sides in _ARRAY.findall(shape):
        digits = re.search(r"\d+", kind)
        bits = int(digits[0]) if digits else 8  # pred
        count = math.prod(int(side) for side in sides.split(",") if side)
        yield count, count * bits // 8


def _moved_bytes(instruction: _Instruction, around: dict[str, _Instruction]) -> int:
    results = list(_arrays(instruction.shape))
    if instruction.opcode == "custom-call":
        results = results[:1]  # after which comes a library's workspace
    operands = [
        a
        for name in instruction.operands
        if name in around
        for a in _arrays(around[name].shape)
    ]
    return sum(size for _, size in results + operands)


def _size_of_product(
    instruction: _Instruction, around: dict[str, _Instruction]
) -> tuple[float, str]:
    """Operations of a matrix product, or of a convolution of stride 1, and its operands' type.

    Of the three arrays, each pair shares axes that the third lacks: the root of the product of
    their sizes is the number of multiplications (of a convolution's kernel, its places count in
    one array only; a matrix product's batch is in all three).
    """
    operands = [around[name].shape for name in instruction.operands[:2] if name in around]
    sizes = [next(_arrays(shape), (0, 0))[0] for shape in (instruction.shape, *operands)]
    window = re.search(r"window=\{size=(\d+)x(\d+)", instruction.line)
    places = int(window[1]) * int(window[2]) if window else 1
    batch = _batch_of_product(instruction.line, operands)
    multiplications = math.sqrt(math.prod(sizes) * places / batch)
    return 2 * multiplications, _ARRAY.findall(operands[0])[0][0] if operands else ""


def _batch_of_product(line: str, operands: list[str]) -> int:
    axes = re.search(r'lhs_batch_dim(?:s=\{|ensions":\[)([\d,"]+)', line)
    if axes is None or not operands:
        return 1
    lengths = _ARRAY.findall(operands[0])[0][1].split(",")
    return math.prod(int(lengths[int(axis)]) for axis in axes[1].replace('"', "").split(","))
