"""What the scripts share, and mistakes that are said before long work; in one process."""

import errno
import io
import json
import os
import pwd
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import platformdirs
import pytest
from bad_input.ground import SCRIPTS, run
from PIL import Image

from jaxunet.config import Config, DataConfig, ModelConfig
from jaxunet.config_json import to_dict
from jaxunet.devices.startup import use_compilation_cache
from jaxunet.errors import ConfigError, Stopped

ALL = sorted(
    path.name for path in SCRIPTS.glob("*.py") if "run_script(main)" in path.read_text()
)


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules."""
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("command_line", "train"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@dataclass(frozen=True)
class Inner:
    dir: Path | None = None


@dataclass(frozen=True)
class Outer:
    out: Path
    inputs: tuple[Path, ...] = ()
    data: Inner = field(default_factory=Inner)
    name: str = "~/name"


def test_a_home_folder_is_meant_by_a_tilde_in_every_path(scripts, monkeypatch):
    from command_line import parse

    monkeypatch.setenv("HOME", "/home/me")
    words = ["--out=~/a", "--inputs", "~/b", "c", "--data.dir", "~"]
    found = parse(Outer, "", args=words)
    home = Path("/home/me")
    assert found == Outer(home / "a", (home / "b", Path("c")), Inner(home), "~/name")


def test_a_path_that_cannot_be_is_refused_with_the_reason(scripts, monkeypatch):
    from command_line import parse

    undecoded = os.fsdecode(b"/runs/\xe4")
    with pytest.raises(
        ConfigError, match=r"/runs/\\udce4' cannot be read as utf-8.*PYTHONUTF8"
    ):
        parse(Outer, "", args=["--out", undecoded])
    monkeypatch.delenv("HOME")
    with (
        mock.patch.object(pwd, "getpwuid", side_effect=KeyError),
        pytest.raises(ConfigError, match=r"~/a starts with ~, but no home folder"),
    ):
        parse(Outer, "", args=["--out", "~/a"])


def test_a_user_without_a_home_has_no_cache_of_programs(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    error = RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(platformdirs, "user_cache_path", mock.Mock(side_effect=error))
    on = SimpleNamespace(jax_enable_compilation_cache=True, jax_compilation_cache_dir=None)
    with mock.patch("jaxunet.devices.startup.jax.config", on):
        assert use_compilation_cache() is None


@pytest.mark.parametrize("words", [["--out", "{}"], ["--out={}"], ["--out=~/run"]])
def test_a_run_is_resumed_with_its_own_configuration_however_out_is_written(
    scripts, monkeypatch, tmp_path, words
):
    from train import read_arguments

    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(DataConfig(image_size=40), ModelConfig(width=6, depth=3))
    (tmp_path / "run").mkdir()
    record = json.dumps({"config": to_dict(config)})
    (tmp_path / "run" / "config.json").write_text(record)
    out = [word.format(tmp_path / "run") for word in words]
    arguments, found = read_arguments([*out, "--resume", "--train.epochs", "7"])
    assert found == tmp_path / "run"
    assert (arguments.config.data, arguments.config.model) == (config.data, config.model)
    assert arguments.train.epochs == 7
    # Without --resume, or with a preset, the run is not asked.
    assert read_arguments(out)[0].model != config.model
    assert read_arguments(["narrow", *out, "--resume"])[0].model.width == 16


@pytest.mark.parametrize("script", ALL)
def test_a_script_finds_its_neighbours_where_python_leaves_out_its_folder(
    script, monkeypatch, capsys
):
    for name in ("command_line", "presets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    away = [path for path in sys.path if Path(path).resolve() != SCRIPTS.resolve()]
    monkeypatch.setattr(sys, "path", away)  # as `python -P` and PYTHONSAFEPATH do
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_output_is_one_sentence():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, SCRIPTS / "export_pytorch.py", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == (
        "error: what is printed cannot be written: No space left on device. Files are whole.\n"
    )


def test_a_full_disk_is_not_taken_for_a_full_output_nor_another_error_for_either(scripts):
    from command_line import run_script

    def end(error):
        with mock.patch("sys.stderr", io.StringIO()) as output:
            with pytest.raises(SystemExit) as stop:
                run_script(mock.Mock(side_effect=error))
            return stop.value.code, output.getvalue()

    full = OSError(errno.ENOSPC, "No space left on device", "/a/file")
    expected = "error: No space left on device for /a/file. What was written before is whole.\n"
    assert end(full) == (1, expected)
    with pytest.raises(PermissionError):
        end(PermissionError(errno.EACCES, "Permission denied", "/a/file"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with pictures and what looks like a run; its model must not be loaded."""
    for name in ("a.png", "same/b.png", "same/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": to_dict(Config())}))
    loaded = AssertionError("the model was loaded")
    monkeypatch.setattr("jaxunet.runs.loading.load", mock.Mock(side_effect=loaded))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["{0}/a.png", "--out", "{0}/m", "--batch-size", 0], 2, "--batch-size is 0, but must"),
        (["{0}/a.png", "--out", "/proc/x/y"], 1, "error: --out /proc/x/y cannot be written to"),
        (["{0}/a.png", "--out", "{0}/a.png"], 1, "a.png cannot be written to: File exists"),
        (["{0}/same", "--out", "{0}/m"], 1, "b.png would all be written to"),
        (["{0}/empty", "--out", "{0}/m"], 1, "empty holds no image to predict"),
        (["{0}", "--out", "{0}/m", "--recursive"], 1, "b.png would all be written to"),
    ],
)
def test_predict_says_what_is_wrong_before_the_model_is_loaded(place, words, status, message):
    before = sorted(place.rglob("*"))
    found, output = run(["predict.py", place / "run", *(str(w).format(place) for w in words)])
    assert found == status, output
    assert message in " ".join(output.split())
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_stderr_that_is_gone_changes_no_exit_status(scripts, number):
    from command_line import run_script

    gone = mock.Mock(wraps=io.StringIO(), **{"write.side_effect": OSError(errno.EIO, "gone")})
    with mock.patch("sys.stderr", gone), pytest.raises(SystemExit) as stop:
        run_script(mock.Mock(side_effect=Stopped("Stopped after step 3.", number)))
    assert gone.write.called
    assert stop.value.code == 128 + number
