"""What a run directory takes, refuses and leaves alone."""

import csv
import errno
import fcntl
import json
import os

import pytest

from jaxunet import files
from jaxunet.config import Config
from jaxunet.errors import RunError
from jaxunet.files import check_encodable, check_writable, system_error, why
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.log import MetricsLog
from jaxunet.runs.record import read_metrics

CONFIG = Config()


@pytest.fixture
def begun(tmp_path):
    """A run that has written config.json and an empty checkpoints/, as one killed early."""
    with RunDirectory(tmp_path / "run", CONFIG, resume=False) as run:
        (run.path / "checkpoints").mkdir()
        run.write_config({"name": "synthetic"})
    return tmp_path / "run"


def resume(run):
    with RunDirectory(run, CONFIG, resume=True) as opened:
        return opened


def test_a_run_killed_before_its_first_checkpoint_starts_anew(begun):
    resume(begun)


@pytest.mark.parametrize("sign", ["folder gone", "was noted", "complete"])
def test_a_run_whose_checkpoints_were_removed_is_not_begun_anew(sign, begun):
    (begun / "metrics.jsonl").write_text('{"step": 1}\n')
    if sign == "folder gone":
        (begun / "checkpoints").rmdir()
    elif sign == "complete":
        (begun / "summary.json").write_text("{}")
    else:
        (begun / "checkpoints" / "4").mkdir()
        RunDirectory(begun, CONFIG, resume=True).write_config()
        (begun / "checkpoints" / "4").rmdir()
    with pytest.raises(RunError, match=r"checkpoints are gone from .*checkpoints.* Put them"):
        resume(begun)
    assert read_metrics(begun / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("again", [False, True])
def test_checkpoints_without_their_run_are_not_gone_on_with(again, tmp_path):
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(RunError, match=r"holds checkpoints, but not the config\.json"):
        RunDirectory(tmp_path / "run", CONFIG, resume=again)


def test_a_users_own_lock_file_is_left_alone(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with RunDirectory(tmp_path, CONFIG, resume=False):
        pass
    (tmp_path / "thesis.tex").write_text("words")
    (tmp_path / ".jaxunet-lock").unlink()
    with pytest.raises(RunError, match="not empty and holds no run"):
        RunDirectory(tmp_path, CONFIG, resume=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "thesis.tex"]
    assert (tmp_path / ".lock").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_no_other_run(number, tmp_path, monkeypatch, capsys):
    def refuse(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number == errno.EIO:
        with pytest.raises(RunError, match="cannot be locked: Input/output error"):
            RunDirectory(tmp_path, CONFIG, resume=False)
    else:
        RunDirectory(tmp_path, CONFIG, resume=False).close()
        assert capsys.readouterr().err.count("has no locks") == 1


def test_a_log_that_was_moved_away_has_each_step_once(tmp_path):
    def log(keep, steps):
        opened = MetricsLog(tmp_path, keep_lines=keep, step=steps[0] - 1)
        for step in steps:
            opened.write(step=step, epoch=1, split="train", values={}, seconds=0.0)
        opened.close()
        return opened.lines

    log(0, [1, 2, 3, 4])
    assert log(3, [4, 5]) == 3
    (tmp_path / "metrics.jsonl").rename(tmp_path / "damaged")
    kept = log(5, [6, 7, 8])  # of which 6 alone was saved before a kill
    assert log(kept + 1, [7, 8]) == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [6, 7, 8]
    with (tmp_path / "metrics.csv").open() as table:
        assert [row["step"] for row in csv.DictReader(table)] == ["6", "7", "8"]


def test_the_table_holds_what_the_log_does(tmp_path):
    """Through a kill in the middle of a row, and of a run that had none, with other values."""
    earlier = {"step": 1, "split": "train", "values": {"old": 0.1}, "wall_seconds": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(earlier) + "\n")

    def log(keep, step):
        opened = MetricsLog(tmp_path, keep_lines=keep, step=step - 1)
        opened.write(
            step=step,
            epoch=1,
            split="train",
            values={"loss": 1 / step},
            seconds=step,
            measured={"peak_process_bytes": 10**12 + step},
        )
        opened.close()

    log(1, 2)
    log(2, 3)
    with (tmp_path / "metrics.csv").open("a") as table:
        table.write("4,1,tr")
    log(2, 3)
    with (tmp_path / "metrics.csv").open() as table:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(table)]
    assert rows == [
        {"step": "1", "split": "train", "old": "0.1", "wall_seconds": "0.5"},
        *(
            {
                "step": str(step),
                "epoch": "1",
                "split": "train",
                "loss": repr(1 / step),
                "wall_seconds": str(step),
                "peak_process_bytes": str(10**12 + step),
            }
            for step in (2, 3)
        ),
    ]


def test_a_log_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(RunError, match=r"tensorboard/\) cannot be written to: File exists"):
        MetricsLog(tmp_path, keep_lines=0, step=0)


def test_checkpoints_that_cannot_be_written_are_found_first(begun, monkeypatch):
    real = files.write_atomically

    def refuse(path, contents):
        if path.parent.name == "checkpoints":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(path, contents)

    monkeypatch.setattr(files, "write_atomically", refuse)
    with pytest.raises(RunError, match="checkpoints cannot be written to: Permission denied"):
        resume(begun)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device. Make space"),
        (errno.EDQUOT, "Your quota there is used up"),
        (errno.EACCES, "Permission denied. Change its owner or its permissions"),
        (errno.EROFS, "Read-only file system. It is mounted read-only"),
        (errno.EIO, "Input/output error."),
    ],
)
def test_the_advice_fits_the_cause(number, remedy, tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=r"--out .*run cannot be written to: ") as raised:
        check_writable(tmp_path / "run", "--out")
    assert remedy in str(raised.value)
    assert ("space" in str(raised.value)) == (number == errno.ENOSPC)
    assert list((tmp_path / "run").iterdir()) == []


def test_no_inodes_are_told_from_no_space(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    counts = os.statvfs(tmp_path)
    monkeypatch.setattr(files.os, "statvfs", lambda _: _Files(counts.f_files or 1, 0))
    assert why(full, tmp_path / "not" / "there").startswith("No inodes left")
    monkeypatch.setattr(files.os, "statvfs", lambda _: _Files(0, 0))  # as btrfs has it
    assert why(full, tmp_path).startswith("No space left")


class _Files:
    def __init__(self, total, free):
        self.f_files, self.f_favail = total, free


def test_the_systems_error_is_found_in_what_libraries_make_of_it():
    wrapped = RuntimeError("of a thread")
    wrapped.__cause__ = OSError(errno.EROFS, "read-only")
    assert system_error(wrapped).errno == errno.EROFS
    tensorstore = ValueError(
        "NOT_FOUND: Failed to create directory: \"x\" [os_error_code='28']"
    )
    assert system_error(tensorstore).errno == errno.ENOSPC
    assert system_error(ValueError("x: Disk quota exceeded")).errno == errno.EDQUOT
    assert system_error(ValueError("shapes differ")) is None


def test_a_name_that_the_locale_cannot_hold_is_refused_for_that(tmp_path):
    check_encodable(tmp_path / "grün")
    with pytest.raises(RunError, match=r"udcfc.*locale's encoding is .*PYTHONUTF8=1"):
        RunDirectory(tmp_path / os.fsdecode(b"gr\xfcn"), CONFIG, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_recorded_of_a_run_stays(begun):
    before = json.loads((begun / "config.json").read_text())
    with RunDirectory(begun, CONFIG, resume=True) as run:
        run.check_data({"name": "synthetic", "fingerprint": "0" * 8}, accept=False)
        run.write_config()
    after = json.loads((begun / "config.json").read_text())
    assert after["config"] == before["config"]
    assert after["dataset"] == {"name": "synthetic", "fingerprint": "0" * 8}
    assert after["has_checkpoints"] is False


def test_how_a_gpu_was_to_choose_outlasts_a_resume_on_another_device(begun):
    record = json.loads((begun / "config.json").read_text())
    assert record["tuning"] == "not on a GPU"
    tuned = {"tune": "quick", "deterministic": True}
    (begun / "config.json").write_text(json.dumps({**record, "tuning": tuned}))
    resume(begun).write_config()
    assert json.loads((begun / "config.json").read_text())["tuning"] == tuned
