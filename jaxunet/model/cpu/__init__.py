"""Convolutions on a CPU, 3x3 and depthwise: our own loops, compiled by LLVM, called by XLA.

`loops` has them all, of `conv`, `kernel_gradient` and `depthwise`; `registers` what they hold
at a time, by processor; `calls` how XLA calls them and shares them among its threads; `emit` a
few words for writing LLVM's code. Here: whether they are on, and how they are compiled (by
llvmlite, each kind in about 0.4 s, when the first convolution of it is traced).
"""

import ctypes
import functools
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import llvmlite.binding as llvm
from llvmlite import ir

from jaxunet.errors import ConfigError
from jaxunet.model.cpu.calls import FFI_VERSION
from jaxunet.model.cpu.loops import (
    CONV,
    CONV_NAMES,
    DEPTHWISE,
    DEPTHWISE_INPUT_GRADIENT,
    DEPTHWISE_KERNEL_GRADIENT,
    DEPTHWISE_NAMES,
    INPUT_GRADIENT,
    KERNEL_GRADIENT,
    build,
    build_depthwise,
)
from jaxunet.model.cpu.registers import Blocks, blocks_for

__all__ = [
    "CONV",
    "DEPTHWISE",
    "DEPTHWISE_INPUT_GRADIENT",
    "DEPTHWISE_KERNEL_GRADIENT",
    "INPUT_GRADIENT",
    "KERNEL_GRADIENT",
    "Blocks",
    "blocks",
    "blocks_for",
    "blocks_with_depthwise",
    "compiled",
    "status",
]

SWITCH = "JAXUNET_CPU_LOOPS"

_lock = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # they own the code, which programs of XLA's call


def blocks() -> Blocks | None:
    """What the loops work on at a time on this machine; None where they are off.

    They are on where they can be: on x86-64 with AVX2 or AVX-512 and on 64-bit ARM, under
    Linux and macOS, with a jaxlib that serves the foreign function interface that `calls` was
    written for. The first call compiles them and makes them known to XLA.

    The environment variable `JAXUNET_CPU_LOOPS` switches them, for comparison or in case of
    trouble: `0` off, so that all convolutions are XLA's; `avx2` holds them to AVX2 on a
    processor with AVX-512. It is read once, when the first convolution is traced.

    Raises:
        ConfigError: the variable has another value, or is `avx2` where AVX2 is not.
    """
    found = _here()
    return found if isinstance(found, Blocks) else None


def blocks_with_depthwise() -> Blocks | None:
    """As `blocks`; where they are on, the depthwise convolution's are now compiled, too."""
    found = blocks()
    if found is not None:
        with _lock:
            _make_depthwise(found)
    return found


def status() -> int | str:
    """For the record of a run: how many lanes the loops have, or why they are off."""
    found = _here()
    return found.lanes if isinstance(found, Blocks) else found


def _here() -> Blocks | str:
    with _lock:  # else two threads might compile them
        return _made_here()


@functools.cache
def _made_here() -> Blocks | str:
    setting = os.environ.get(SWITCH, "")
    features = llvm.get_host_cpu_features()
    found = choose(setting, sys.platform, platform.machine(), features, _ffi_version())
    if isinstance(found, Blocks):
        engine = compiled(found, *_processor())
        jax.devices()  # before there is a backend, what is refused would end its start
        try:
            register(found, engine)
        except jax.errors.JaxRuntimeError as error:
            return f"XLA refuses them: {error}"
    return found


@functools.cache
def _make_depthwise(found: Blocks) -> None:
    engine = compiled(found, *_processor(), build_depthwise)
    register(found, engine, DEPTHWISE_NAMES)


def _processor() -> tuple[str, str]:
    """LLVM's names of the one to compile for and of its features."""
    features = llvm.get_host_cpu_features()
    if os.environ.get(SWITCH) == "avx2" and features.get("avx512f"):
        return "haswell", ""
    return llvm.get_host_cpu_name(), features.flatten()


def choose(
    setting: str,
    system: str,
    machine: str,
    features: dict[str, bool],
    ffi_version: tuple[int, int] | None,
) -> Blocks | str:
    """Which loops a machine gets, or why none.

    Args:
        setting: value of `JAXUNET_CPU_LOOPS`; empty if it is not set.
        system, machine: as `sys.platform` and `platform.machine()`.
        features: of the processor, by LLVM's names.
        ffi_version: of XLA's foreign function interface, major and minor; None if unknown.

    Raises:
        ConfigError: see `blocks`.
    """
    if setting not in ("", "1", "0", "avx2"):
        raise ConfigError(
            f"The environment variable {SWITCH} is {setting!r}; it must be 0 (loops off), avx2 "
            "(not wider than AVX2), or 1, as if it were not set."
        )
    if setting == "0":
        return f"{SWITCH} is 0"
    if setting == "avx2":
        features = {name: features.get(name, False) for name in ("avx2", "fma")}
    if system not in ("linux", "darwin"):
        return f"there are none for {system}"
    if ffi_version is None:
        return "jaxlib doesn't tell the version of its foreign function interface"
    # A minor version adds to the structures; a major one may move what is in them.
    if ffi_version[0] != FFI_VERSION[0] or ffi_version < FFI_VERSION:
        theirs, ours = (".".join(map(str, v)) for v in (ffi_version, FFI_VERSION))
        return f"jaxlib's foreign function interface is {theirs}, not {ours} or a later minor"
    found = blocks_for(machine, features)
    if setting == "avx2" and (found is None or machine != "x86_64"):
        raise ConfigError(
            f"The environment variable {SWITCH} is avx2, but this processor ({machine}) has no "
            "AVX2 with FMA; leave it unset, or set it to 0."
        )
    return found or f"there are none for this processor ({machine})"


def register(
    blocks: Blocks, engine: llvm.ExecutionEngine, names: Sequence[str] = CONV_NAMES
) -> None:
    """Make compiled loops known to XLA, for as long as the process lives."""
    _engines.append(engine)
    for name in map(blocks.target, names):
        pointer = ctypes.CFUNCTYPE(ctypes.c_void_p)(engine.get_function_address(name))
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(pointer), platform="cpu")


def compiled(
    blocks: Blocks,
    cpu: str,
    features: str,
    build: Callable[[Blocks], ir.Module] = build,
) -> llvm.ExecutionEngine:
    """Machine code of what `build` gives, for a processor by LLVM's names of it and of its
    features."""
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
