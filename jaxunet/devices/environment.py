"""The machine, versions and code that a process runs on, for the record."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from jaxunet.devices import tuning
from jaxunet.model import cpu
from jaxunet.workers import usable_cores


def environment(*others: str) -> dict[str, Any]:
    """Versions, devices and code of this process, for a record of what was run.

    Args:
        others: packages to name beside jaxunet's own.

    Returns:
        `versions`, by package (None for one that is used without being installed, as jaxunet
        from a checkout); `devices`; `host`; `cpu_loops`, how many lanes the loops of
        `jaxunet.model.cpu` have, or why they are off; `tuning`, how a GPU's algorithms were
        chosen (`jaxunet.devices.tuning`); `git_commit` of jaxunet's code (None outside its
        repository).
    """
    packages = (
        "jaxunet",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        *others,
    )
    devices = jax.devices()
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "host": {"machine": platform.machine(), "cpu": _cpu_model(), "cores": usable_cores()},
        "cpu_loops": cpu.status() if devices[0].platform == "cpu" else "not on a CPU",
        "tuning": tuning.record() if devices[0].platform == "gpu" else "not on a GPU",
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), None)


def _git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit that `file` is of, None if no repository tracks it.

    It may lie in another's repository, as in a virtual environment there.
    """

    def git(*words: str) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=file.parent, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """The command that started this process, as typed from the repository."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
