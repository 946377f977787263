"""A run's directory: what it holds, who may write to it, and the lines it logs.

config.json      configuration, versions, devices, git commit, dataset
metrics.jsonl    one object a line: step, epoch, split, values, wall_seconds
tensorboard/     the same as event files
checkpoints/     see `jaxunet.checkpoint`
figures/         curves.png, predictions.png
summary.json     final scores, by protocol
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax

from jaxunet.config import Config, differences, from_dict, to_dict
from jaxunet.distributed import is_main, on_main
from jaxunet.errors import ConfigError, RunError
from jaxunet.files import write_atomically, write_json

# What may change between a run and its continuation: it alters no number already written.
CONTINUABLE = (
    "train.epochs",
    "train.checkpoint_every",
    "data.dir",
    "data.prepared_dir",
    "data.loader",
    "data.cache",
    "data.workers",
)


def environment(*others: str) -> dict[str, Any]:
    """Versions, devices and code of this process, for a record of what was run.

    Args:
        others: packages to name beside jaxunet's own.
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
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "host": {"machine": platform.machine(), "cpu": _cpu_model(), "cores": usable_cores()},
        "git_commit": _git_commit(),
    }


def usable_cores() -> int:
    """CPU cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), None)


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def command_line() -> str:
    """The command that started this process, as typed from the repository."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])


def load_config(run: Path) -> Config:
    """The configuration a run was made with.

    Raises:
        RunError: `run` is no run directory.
        ConfigError: its config.json is damaged or was edited into something not allowed.
    """
    path = run / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{run} is not a run directory: {path.name} is not there or not readable. "
            "Give the --out of an earlier experiments/train.py."
        ) from error
    try:
        return from_dict(Config, json.loads(text)["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a run's configuration: {error}") from error


def config_of_main(read: Callable[[], Config]) -> Config:
    """The configuration that process 0 reads, on every process."""
    return from_dict(Config, on_main(lambda: to_dict(read()), "reading the configuration"))


class RunDirectory:
    """Exclusive access to one run directory while a run is writing to it.

    Of several processes number 0 holds it, and the others neither read nor write there.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool):
        """Take hold of `path` for `config`.

        Raises:
            RunError: another process holds it, it holds a run and `resume` is False, it
                holds something else, it cannot be written to, or its configuration differs
                in a field that must not change.
        """
        self.path, self.config = path, config
        self._lock: IO[str] | None = None
        on_main(partial(self._take, resume), "taking hold of the run directory")

    def _take(self, resume: bool) -> None:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"--out {path} cannot be written to: {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunError(
                f"--out {path} is in use by another run; wait for it, or choose another "
                "directory."
            ) from error
        try:
            self._check(resume)
        except BaseException:
            self.close()
            raise

    def _check(self, resume: bool) -> None:
        found = sorted(p.name for p in self.path.iterdir() if p.name != ".lock")
        if not found:
            return
        if not (self.path / "config.json").exists():
            if found == ["checkpoints"] or all(name.startswith(".") for name in found):
                return  # killed before it wrote anything worth keeping
            raise RunError(
                f"--out {self.path} is not empty and holds no run (found "
                f"{', '.join(found[:3])}); choose another directory."
            )
        if not resume:
            state = "a complete" if (self.path / "summary.json").exists() else "an unfinished"
            raise RunError(
                f"--out {self.path} already holds {state} run. Add --resume to go on with it "
                "(with more --train.epochs if it is complete), or choose another --out."
            )
        changed = [
            line
            for line in differences(load_config(self.path), self.config)
            if line.split(":")[0] not in CONTINUABLE
        ]
        if changed:
            raise RunError(
                f"--out {self.path} was made with another configuration and cannot go on "
                f"with this one. Differing: {'; '.join(changed)}."
            )

    def write_config(self, dataset: dict[str, Any]) -> None:
        """config.json: the configuration and all that is known of where it runs."""
        if not is_main():
            return
        record = {"config": to_dict(self.config), "command": command_line(), **environment()}
        write_json(self.path / "config.json", {**record, "dataset": dataset})

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; one cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            lines.append(json.loads(line))
    return lines


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard's event files."""

    def __init__(self, run: Path, *, keep_lines: int, step: int):
        """Go on at `step` after `keep_lines` lines; a killed run's later ones are dropped."""
        from tensorboardX import SummaryWriter

        path = run / "metrics.jsonl"
        kept = read_metrics(path)[:keep_lines]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = kept
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(
        self, *, step: int, epoch: int, split: str, values: dict[str, float], seconds: float
    ) -> None:
        line = {
            "step": step,
            "epoch": epoch,
            "split": split,
            "values": values,
            "wall_seconds": round(seconds, 3),
        }
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()
