"""A run's directory: what it holds, who may write to it, and the lines it logs.

config.json      configuration, versions, devices, git commit, dataset
metrics.jsonl    one object a line: step, epoch, split, values, wall_seconds
tensorboard/     the same as event files
checkpoints/     see `jaxunet.checkpoint`
figures/         curves.png, predictions.png
summary.json     final scores, by protocol
"""

import fcntl
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from jaxunet.config import Config, differences, from_dict, to_dict
from jaxunet.distributed import is_main, on_main
from jaxunet.environment import command_line, environment
from jaxunet.errors import ConfigError, RunError
from jaxunet.files import write_atomically, write_json

# What may change between a run and its continuation: it alters no number already written.
CONTINUABLE = (
    "train.epochs",
    "train.checkpoint_every",
    "data.dir",
    "data.images",
    "data.masks",
    "data.mask_suffix",
    "data.max_megapixels",
    "data.prepared_dir",
    "data.loader",
    "data.cache",
    "data.workers",
)


def load_config(run: Path) -> Config:
    """The configuration a run was made with.

    Raises:
        RunError: `run` is no run directory.
        ConfigError: its config.json is damaged or was edited into something not allowed.
    """
    path = run / "config.json"
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{run} is not a run directory: {path.name} is not there or not readable. "
            "Give the --out of an earlier experiments/train.py."
        ) from error
    try:
        record = json.loads(contents)
        if not isinstance(record, dict) or "config" not in record:
            raise ConfigError("There is no field 'config'.")
        return from_dict(Config, _with_earlier_meaning(record["config"]))
    except (ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a run's configuration: {str(error).rstrip('.')}. Undo what was "
            f"changed in it; a copy is in progress/metadata of each {run / 'checkpoints'}/STEP."
        ) from error


def _with_earlier_meaning(config: Any) -> Any:
    """A recorded configuration with what it meant by fields that its version lacked."""
    data = config.get("data") if isinstance(config, dict) else None
    if isinstance(data, dict) and data.get("name") == "folder":
        return {**config, "data": {"folder_split": "permutation", **data}}
    return config


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
        read_metrics(self.path / "metrics.jsonl")  # before anything is written

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
    """The whole lines of a metrics.jsonl; one cut off by a kill is left out.

    Raises:
        RunError: a line is no JSON object.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(
                f"Line {number} of {path} is no JSON object: {error}. Undo what was changed in "
                "it, or move the file away, and the log starts anew."
            ) from error
    return lines


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard's event files."""

    def __init__(self, run: Path, *, keep_lines: int, step: int):
        """Go on at `step` after `keep_lines` lines; a killed run's later ones are dropped."""
        path = run / "metrics.jsonl"
        kept = read_metrics(path)[:keep_lines]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = Events(run / "tensorboard", purge_step=step + 1)

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
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.write(f"{split}/{name}", value, step)
        except OSError as error:
            raise RunError(
                f"{self._file.name} cannot be written to: {error.strerror}. What was saved "
                "before is whole. Once that is mended, go on with --resume."
            ) from error

    def close(self) -> None:
        # On a full disk even this fails; what was flushed before is all there is.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._events.close()


class Events:
    """Scalars for TensorBoard.

    Written here and now: tensorboardX's `SummaryWriter` does so in a thread, whose errors
    nobody hears.
    """

    FLUSH_SECONDS = 10.0

    def __init__(self, folder: Path, *, purge_step: int):
        """Go on in `folder`; TensorBoard drops what older files say from `purge_step` on."""
        # Imported late: where PyTorch is installed, tensorboardX imports it.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        def scalar(name: str, value: float, step: int) -> Any:
            content = summary.scalar(name, value)
            return Event(wall_time=time.time(), step=step, summary=content)

        self._scalar = scalar
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        self._file.write_event(Event(step=purge_step, session_log=start))
        self._flushed = time.monotonic()

    def write(self, name: str, value: float, step: int) -> None:
        self._file.write_event(self._scalar(name, value, step))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()
