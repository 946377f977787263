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

ROOT = Path(__file__).parents[2]


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
            **{name: version_of(name) for name in packages},
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


def version_of(package: str) -> str | None:
    """Of an installed package; None for one that is not, or is used from a checkout."""
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


def _git_commit(file: Path = Path(__file__), root: Path = ROOT) -> str | None:
    """The commit that `file` is of, None if no repository of its own tracks it.

    Its checkout may be a copy in another repository, which tracks it, or lie in a virtual
    environment there: the commit of that one would say nothing of the code.

    Args:
        root: the folder that jaxunet's repository has the file in.
    """

    def git(*words: str) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(root):
            return None
        git("ls-files", "--error-unmatch", str(file.relative_to(root)))
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """The command that started this process, as typed from the repository."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
