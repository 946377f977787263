"""3x3 convolutions on a CPU: our own loops, compiled by LLVM, called by XLA.

`loops` has the two loops, `calls` how XLA calls them and shares them among its threads,
`emit` a few words for writing LLVM's code. Here: for which processors, and how they are
compiled (by llvmlite, in about 0.4 s, when the first convolution is traced).
"""

import ctypes
import functools
import platform
import re
import sys
import threading
from pathlib import Path

import jax
import llvmlite.binding as llvm

from jaxunet.cpu.calls import FFI_VERSION
from jaxunet.cpu.loops import CONV, INPUT_GRADIENT, KERNEL_GRADIENT, Blocks, build

__all__ = [
    "CONV",
    "INPUT_GRADIENT",
    "KERNEL_GRADIENT",
    "Blocks",
    "blocks",
    "blocks_for",
    "compiled",
]

_lock = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # they own the code, which programs of XLA's call


def blocks() -> Blocks | None:
    """What the loops work on at a time on this machine; None where they can't be had.

    They can on x86-64 with AVX2 or AVX-512 and on 64-bit ARM, under Linux and macOS, with a
    jaxlib whose foreign function interface is the one that `calls` was written for. The first
    call compiles them and makes them known to XLA.
    """
    with _lock:
        return _blocks_here()


@functools.cache
def _blocks_here() -> Blocks | None:
    if sys.platform not in ("linux", "darwin") or _ffi_version() != FFI_VERSION:
        return None
    features = llvm.get_host_cpu_features()
    found = blocks_for(platform.machine(), features)
    if found is not None:
        register(found, compiled(found, llvm.get_host_cpu_name(), features.flatten()))
    return found


def register(blocks: Blocks, engine: llvm.ExecutionEngine) -> None:
    """Make compiled loops known to XLA, for as long as the process lives."""
    _engines.append(engine)
    for name in map(blocks.target, (CONV, INPUT_GRADIENT, KERNEL_GRADIENT)):
        pointer = ctypes.CFUNCTYPE(ctypes.c_void_p)(engine.get_function_address(name))
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(pointer), platform="cpu")


def blocks_for(machine: str, features: dict[str, bool]) -> Blocks | None:
    """What fits into the registers of a processor: 32 (AVX-512, ARM) or 16 (AVX2) vectors."""
    if machine == "x86_64":
        if features.get("avx512f"):
            return Blocks(lanes=16, pixels=(16, 8, 4), channels=8)
        if features.get("avx2") and features.get("fma"):
            return Blocks(lanes=8, pixels=(8, 4), channels=4)
    if machine in ("aarch64", "arm64"):
        return Blocks(lanes=4, pixels=(16, 8, 4), channels=8)
    return None


def compiled(blocks: Blocks, cpu: str, features: str) -> llvm.ExecutionEngine:
    """Machine code of both loops for a processor, by LLVM's names of it and its features."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if blocks.lanes == 16:
        features += ",-prefer-256-bit"  # or LLVM halves the vectors
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3
    )
    module = llvm.parse_assembly(str(build(blocks)))
    module.triple = target.triple
    module.verify()
    # The loops are vectors already: LLVM places them in registers, no more.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    return engine


def _ffi_version() -> tuple[int, int] | None:
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    if not header.exists():
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None
