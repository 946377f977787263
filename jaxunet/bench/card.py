"""The GPU that JAX and PyTorch share in one process: its memory, TF32, and what it is."""

import ctypes
import os
import subprocess
from typing import Any

import jax

_QUERY = (
    *("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "temperature.gpu"),
)


def share_memory() -> None:
    """Let JAX take no more of a GPU's memory than it needs, unless the user said otherwise.

    Else it takes three quarters at once, and leaves PyTorch the rest. Call it before anything
    asks JAX for a device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def use_tf32(allowed: bool, *, pytorch: bool) -> bool:
    """Whether float32 products may be rounded to TF32 on an NVIDIA GPU, the same for both.

    JAX allows it unless told otherwise; a setting of JAX's own (as by
    `JAX_DEFAULT_MATMUL_PRECISION`) goes first. Other devices are left alone by both.

    Returns:
        What holds now.
    """
    settings: Any = jax.config
    if not allowed:
        # In the environment too, for processes that are started from here.
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        jax.config.update("jax_default_matmul_precision", "highest")
    allowed = settings.jax_default_matmul_precision in (None, "default", "tensorfloat32")
    if pytorch:
        import torch

        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return allowed


def card() -> dict[str, str] | None:
    """What `nvidia-smi` says of the first GPU just now, clocks in MHz; None without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(_QUERY, values, strict=True))


def cudnn_version() -> int | None:
    """Of the cuDNN that this process uses, such as 91002 for 9.10.2; None without one."""
    try:
        return int(ctypes.CDLL("libcudnn.so.9").cudnnGetVersion())
    except (OSError, AttributeError):
        return None
