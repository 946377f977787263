"""A run's directory: what it holds, who may write to it, and what it may go on with.

config.json      configuration, versions, devices, git commit, dataset, which other data were
                 accepted later, and the source, SHA-256 and licence of pretrained weights or
                 of those that it was fine-tuned from; the seconds that kills have
                 cost (`lost_seconds`)
metrics.jsonl    one object a line: step, epoch, split, values, wall_seconds, and of training
                 steps `measured`, which no other run has the same: speed and memory
metrics.csv      the same as a table
tensorboard/     the same as event files, and traces of --profile-steps
checkpoints/     see `jaxunet.runs.checkpoint`
figures/         curves.png, predictions.png
summary.json     final scores, by protocol
MODEL_CARD.md    what the model is, for those who get it without the run
calibration.json the threshold and temperature that serve best, once they were asked for
tuning/          on a GPU, the algorithms that its steps were compiled with
wandb/           of --log wandb, with wandb-id.txt, by which a resumed run goes on there
"""

import errno
import fcntl
import sys
from functools import partial
from pathlib import Path
from typing import IO, Any

from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.devices.distributed import is_main, on_main
from jaxunet.devices.environment import command_line, environment
from jaxunet.errors import RunError
from jaxunet.files import check_encodable, check_writable, why, write_json
from jaxunet.learning.optim import extend_schedule
from jaxunet.provenance import disagreement
from jaxunet.runs.record import (
    config_of_main,
    load_config,
    other_data,
    read_metrics,
    read_record,
)

LOCK = ".jaxunet-lock"

# What may change between a run and its continuation: it alters no number already written.
CONTINUABLE = (
    "train.epochs",
    "train.checkpoint_every",
    "train.eval_batch_size",
    "train.patience",
    "optimizer.extend",  # what it changes, and whether it may, is said by `extend_schedule`
    "optimizer.extended_at",
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
        self._record: dict[str, Any] = {}  # of the run that is there already
        self._recorded = config  # what that record says of it
        self._data: dict[str, Any] = {}  # what is to be recorded of the data
        self._weights: dict[str, str] | None = None  # what it is made from, for the record
        self._init_from: dict[str, Any] | None = None
        self._logged = 0.0  # seconds of training and evaluation, by the last line of its log
        self._lost = 0.0
        on_main(partial(self._take, resume), "taking hold of the run directory")

    def _take(self, resume: bool) -> None:
        check_encodable(self.path, "--out")
        self._refuse_what_is_no_run()  # before anything is written there
        for folder in (self.path, self.path / "checkpoints"):
            if folder == self.path or folder.exists():
                check_writable(folder, "--out")
        self._lock = _locked(self.path)
        try:
            self._check(resume)
        except BaseException:
            self.close()
            raise

    def _refuse_what_is_no_run(self) -> None:
        path = self.path
        try:
            found = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
        except OSError as error:
            raise RunError(f"--out {path} cannot be read: {why(error, path)}") from error
        if "config.json" in found:
            return
        found = [name for name in found if not name.startswith(".")]
        if not found or (found == ["checkpoints"] and not self._steps()):
            return  # killed before it wrote anything worth keeping
        if found == ["checkpoints"]:
            raise RunError(
                f"--out {path} holds checkpoints, but not the config.json of the run that "
                "they are of. Put it back (a copy of the configuration is in "
                f"progress/metadata of each {path / 'checkpoints'}/STEP), or choose another "
                "--out."
            )
        raise RunError(
            f"--out {path} is not empty and holds no run (found {', '.join(found[:3])}); "
            "choose another directory."
        )

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is one to go on from."""
        return bool(self._steps())

    def _steps(self) -> list[str]:
        """Names of the checkpoints that there are."""
        folder = self.path / "checkpoints"
        return [each.name for each in folder.glob("*") if each.name.isdigit()]

    def _check(self, resume: bool) -> None:
        if not (self.path / "config.json").exists():
            return
        complete = (self.path / "summary.json").exists()
        if not resume:
            state = "a complete" if complete else "an unfinished"
            raise RunError(
                f"--out {self.path} already holds {state} run. Add --resume to go on with it "
                "(with more --train.epochs if it is complete), or choose another --out."
            )
        self._recorded = load_config(self.path)
        changed = disagreement(
            to_dict(self._recorded),
            to_dict(self.config),
            recorded=f"--out {self.path} was made with another configuration, which",
            there="this one",
            ignore=CONTINUABLE,
        )
        if changed:
            raise RunError(f"{changed} Go on with the run's own, or choose another --out.")
        self._record = read_record(self.path)
        had = complete or self._record.get("has_checkpoints")
        if not self._steps() and (had or not (self.path / "checkpoints").exists()):
            raise RunError(
                f"--out {self.path} is a run whose checkpoints are gone from "
                f"{self.path / 'checkpoints'}, so that there is nothing to go on from. Put "
                "them back, or train anew with another --out."
            )
        for line in read_metrics(self.path / "metrics.jsonl")[-1:]:
            self._logged = _seconds(line.get("wall_seconds"))

    def check_data(self, dataset: dict[str, Any], *, accept: bool) -> bool:
        """Make sure that a run goes on with the data that it was trained on.

        Returns:
            Whether they are others, and accepted.

        Args:
            dataset: what `jaxunet.runs.evaluation.describe_split` gives.
            accept: take other data too; it is recorded.

        Raises:
            RunError: the data are others, and `accept` is False.
        """
        return bool(on_main(partial(self._check_data, dataset, accept), "comparing the data"))

    def _check_data(self, dataset: dict[str, Any], accept: bool) -> bool:
        said = other_data(self.path, dataset, self.config.data) if self._record else None
        if said and not accept:
            raise RunError(
                f"{said} A run goes on with its own data only: bring them back, or train anew "
                "with another --out. If you mean to go on with the others, add "
                "--accept-other-data, which is recorded."
            )
        accepted = list(self._record.get("accepted_data", []))
        if said:
            accepted.append({"why": said, "dataset": dataset})
        elif accepted:
            accepted[-1] = {**accepted[-1], "dataset": dataset}
        first = self._record.get("dataset", {})
        self._data = {
            "dataset": first if accepted else {**first, **dataset},
            **({"accepted_data": accepted} if accepted else {}),
        }
        return bool(said)

    def extend(self, updates_per_epoch: int) -> Config:
        """The configuration, with what `optim.extend_schedule` keeps or adds."""

        def extended() -> Config:
            done = max(map(int, self._steps()), default=0)
            return extend_schedule(self._recorded, self.config, updates_per_epoch, done)

        self.config = config_of_main(extended)
        return self.config

    def begin(self, weights: dict[str, str] | None, init_from: dict[str, Any] | None) -> None:
        """Note what the first state is made from; see `jaxunet.runs.starting`.

        Raises:
            RunError: a run that has no checkpoint yet was to start from something else.
        """
        asked = self._record.get("init_from")
        if asked and (not init_from or init_from["sha256"] != asked["sha256"]):
            raise RunError(
                f"{self.path} was to start from {asked['source']} (SHA-256 "
                f"{asked['sha256'][:16]}...) and has no checkpoint yet: give --init-from that "
                "again, or another --out."
            )
        self._weights, self._init_from = weights, init_from

    def lost(self, saved: float) -> float:
        """Seconds of work that no checkpoint holds, over all restarts; they are recorded.

        Args:
            saved: seconds of training and evaluation that the latest checkpoint holds. What
                the log says beyond them is lost, and is about to be cut off.
        """
        before = _seconds(self._record.get("lost_seconds"))
        self._lost = before + max(0.0, self._logged - saved)
        return self._lost

    def write_config(
        self, dataset: dict[str, Any] | None = None, *, at_risk: float = 0.0
    ) -> None:
        """config.json: the configuration and all that is known of where it runs.

        Args:
            dataset: of a run that `check_data` was not asked about.
            at_risk: seconds that this process took to start, which are lost if it is killed
                before it has saved and written this again.
        """
        if not is_main():
            return
        record = {"config": to_dict(self.config), "command": command_line(), **environment()}
        if not isinstance(record["tuning"], dict):  # a GPU's choices outlast a resume elsewhere
            record["tuning"] = self._record.get("tuning", record["tuning"])
        record |= self._data if dataset is None else {"dataset": dataset}
        if weights := self._weights or self._record.get("weights"):
            record["weights"] = weights
        if init_from := self._init_from or self._record.get("init_from"):
            record["init_from"] = init_from
        if lost := self._lost + at_risk:
            record["lost_seconds"] = lost
        record["has_checkpoints"] = bool(self._steps())
        write_json(self.path / "config.json", record)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _seconds(found: Any) -> float:
    """What a record says that took so long, if it says so; records can be edited."""
    return float(found) if isinstance(found, int | float) else 0.0


def _locked(folder: Path) -> IO[str] | None:
    """A file that holds the lock of `folder` until it is closed; None where there are none.

    Raises:
        RunError: another process has the lock, or it can't be had.
    """
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError as error:
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunError(
                f"--out {folder} is in use by another run; wait for it, or choose another "
                "directory."
            ) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise RunError(f"--out {folder} cannot be locked: {why(error, folder)}") from error
        print(
            f"warning: the file system of {folder} has no locks ({error.strerror}); see to it "
            "yourself that no other run writes there.",
            file=sys.stderr,
        )
        return None
