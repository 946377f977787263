"""Devices that are not there: XLA's compilers for TPU and GPU run on any CPU."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies

from jaxunet.devices import libtpu
from jaxunet.devices.chips import H100, TPUS, Chip
from jaxunet.errors import ConfigError

GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_collect_cost_model_stats": True}
"""Without a card no algorithm can be tried; XLA's estimates of time go into the program."""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for, none of which need be there.

    Attributes:
        name: as it was asked for, such as `v5e:2x2`.
        devices: in JAX's order; they can be compiled for, but hold no arrays.
        compiler_options: for `Lowered.compile`.
    """

    name: str
    chip: Chip
    platform: Literal["tpu", "gpu"]
    devices: Sequence[jax.Device]
    compiler_options: dict[str, Any]


def compile_only() -> None:
    """Let JAX start nothing but the CPU in this process: it shall compute nothing.

    Call it before anything asks JAX for a device; devices that are there stay free for others.
    What is compiled can't be loaded here, so nothing is kept for a second start.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def absent(name: str) -> Topology:
    """The topology `name`: a TPU slice such as `v5e:2x2` or `v5p:2x2x1`, or `h100:8`.

    Environment variables that a compiler asks for are set where they are unset.

    Raises:
        ConfigError: there is none of this name, or its compiler is not installed.
    """
    kind, _, size = name.partition(":")
    if kind == "h100" and re.fullmatch("[1-8]", size):
        return _gpus(name, int(size))
    if kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", size):
        return _tpu_slice(name, kind)
    raise ConfigError(
        f"--topology is {name!r}; give a TPU slice by its kind ({', '.join(TPUS)}) and the "
        "chips along each axis, such as v5e:2x2, v6e:4x4 or v5p:2x2x1, or GPUs of one host, "
        "h100:1 to h100:8."
    )


def _tpu_slice(name: str, kind: str) -> Topology:
    _needs("libtpu", "tpu", name, "a TPU")
    libtpu.answer()
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "lockfile" in reason:
            raise ConfigError(
                f"libtpu is in use by another process ({reason}). Wait for it to end, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1: compiling for a TPU takes none."
            ) from error
        raise ConfigError(
            f"--topology is {name}, which libtpu does not know ({reason}). Slices are 1x1, "
            "2x2, 2x4, 4x4 and so on up to 16x16, for v5p of three axes, such as 2x2x1."
        ) from error
    return Topology(name, TPUS[kind], "tpu", devices, {})


def _gpus(name: str, count: int) -> Topology:
    _needs("jax_cuda13_plugin", "cuda", name, "a GPU")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    target = Path(__file__).with_name("h100.textproto").read_text(encoding="utf-8")
    try:
        devices = topologies.get_topology_desc(
            name, platform="cuda", target_config=target, topology=f"1x1x{count}"
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"JAX's CUDA plugin does not compile for {name} here: {str(error).splitlines()[0]}"
        ) from error
    return Topology(name, H100, "gpu", devices, dict(GPU_OPTIONS))


def _needs(package: str, extra: str, name: str, device: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"To compile for {name} takes {package}, which is not installed: "
            f"python -m pip install -e '.[{extra}]'. It needs no machine with {device}."
        )
