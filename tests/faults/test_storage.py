"""Checkpoints that are damaged, disks that are full, directories in use, impatient users."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from scripts import SMALL, command, environment, run

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.errors import RunError
from jaxunet.runs import loading as trained
from jaxunet.runs.training import train


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return Config(
        data=DataConfig(
            image_size=16,
            prepared_dir=tmp_path_factory.mktemp("prepared"),
            synthetic_train=16,
            synthetic_validation=8,
        ),
        model=ModelConfig(width=4, depth=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=0.9),
        train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8),
    )


@pytest.fixture(scope="module")
def sound(config, tmp_path_factory):
    """A run with the checkpoints 2 and 4, and the longer one that it becomes."""
    out = tmp_path_factory.mktemp("sound")
    data = prepare(config.data, progress=False)
    train(config, data, out / "run", show_progress=False)
    shutil.copytree(out / "run", out / "longer")
    longer = replace(config, train=replace(config.train, epochs=3))
    outcome = train(longer, data, out / "longer", resume=True, show_progress=False)
    return out / "run", longer, data, outcome


def arrays(checkpoint: Path) -> list[Path]:
    """The files of values: how TensorStore spreads them differs from one save to the next."""
    return [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]


def flip_a_bit(checkpoint: Path) -> None:
    for path in arrays(checkpoint):
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 4
        path.write_bytes(contents)


def cut_short(checkpoint: Path) -> None:
    for path in arrays(checkpoint):
        path.write_bytes(path.read_bytes()[:-100])


def remove(checkpoint: Path) -> None:
    for path in arrays(checkpoint):
        path.unlink()


DAMAGES = {
    "flipped bits": flip_a_bit,
    "arrays cut short": cut_short,
    "arrays gone": remove,
    "state gone": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "manifest gone": lambda checkpoint: (checkpoint / "state" / "manifest.ocdbt").unlink(),
    "progress gone": lambda checkpoint: shutil.rmtree(checkpoint / "progress"),
    "progress edited": lambda checkpoint: (checkpoint / "progress" / "metadata").write_text(
        (checkpoint / "progress" / "metadata")
        .read_text()
        .replace('next_batch": 4', 'next_batch": 3')
    ),
    "progress empty": lambda checkpoint: (checkpoint / "progress" / "metadata").write_text(""),
    "scores cut short": lambda checkpoint: (checkpoint / "metrics" / "metrics").write_text("{"),
    "metadata garbled": lambda checkpoint: (checkpoint / "_CHECKPOINT_METADATA").write_text(
        "{"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latest_checkpoint_is_named_and_the_one_before_is_used(
    damage, sound, tmp_path, capfd
):
    source, longer, data, expected = sound
    shutil.copytree(source, tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "checkpoints" / "4")
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "4").rglob("*"))

    found = train(longer, data, tmp_path / "run", resume=True, show_progress=False)
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_array_equal(a, b)
    said = capfd.readouterr().err
    if damage in ("metadata garbled",):  # which nothing needs
        return
    assert re.search(
        r"warning: The checkpoint of step 4 in .* (is damaged|cannot be read)", said
    )
    assert f"It was moved to {tmp_path / 'run' / 'damaged-4'}" in said
    aside = tmp_path / "run" / "damaged-4"
    assert sorted(p.name for p in aside.rglob("*")) == left


def test_reading_only_moves_nothing(sound, tmp_path, capfd):
    shutil.copytree(sound[0], tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / "4")
    assert trained.load(tmp_path / "run").step == 2
    assert "Step 2 is used instead" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "4").exists()


def test_when_no_checkpoint_is_good_all_are_named_and_none_is_touched(sound, tmp_path):
    source, longer, data, _ = sound
    shutil.copytree(source, tmp_path / "run")
    for step in ("2", "4"):
        cut_short(tmp_path / "run" / "checkpoints" / step)
    before = contents(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunError, match=r"checkpoint of step 4 .* Nor can those before it: 2"):
        train(longer, data, tmp_path / "run", resume=True, show_progress=False)
    assert contents(tmp_path / "run" / "checkpoints") == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_kill_left_half_saved_is_removed(sound, tmp_path):
    source, longer, data, _ = sound
    shutil.copytree(source, tmp_path / "run")
    half = tmp_path / "run" / "checkpoints" / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "4", half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    assert trained.load(tmp_path / "run").step == 4
    assert half.exists()  # a run may be writing it, for all that a reader knows
    train(longer, data, tmp_path / "run", resume=True, show_progress=False)
    assert not half.exists()


def on_a_small_disk(size: str, disk: Path, *commands: list[str]) -> list[tuple[int, str]]:
    """Status and output of commands that see a file system of `size` at `disk`."""
    disk.mkdir()
    mount = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs user namespaces")
    script = (
        "import json, subprocess, sys\n"
        f"subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size={size}', 'tmpfs', {str(disk)!r}],"
        " check=True)\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    done = subprocess.run(command, capture_output=True, text=True)\n"
        "    print(json.dumps([done.returncode, done.stdout + done.stderr]))\n"
    )
    done = subprocess.run(
        [*mount, sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


WIDE = [*SMALL, "--model.width", "16", "--train.checkpoint-every", "1"]


def test_a_disk_that_is_full_while_saving_costs_no_earlier_checkpoint(tmp_path):
    prepared = ("--data.prepared-dir", tmp_path / "prepared")
    out = tmp_path / "disk" / "run"
    words = (*WIDE, *prepared, "--out", out)
    (status, output), (read_status, read) = on_a_small_disk(
        "900k",
        tmp_path / "disk",
        command("train.py", *words),
        # What the failed save left there may leave no room for the scores.
        command("evaluate.py", out, "--out", tmp_path / "scores"),
    )
    assert status == 1, output
    assert "No space left on device" in output
    assert "go on with --resume" in output
    assert "Traceback" not in output
    assert read_status == 0, read
    assert "step " in read


def test_a_save_that_fails_for_want_of_inodes_says_so_and_ends_at_once(tmp_path):
    """Orbax would wait for 300 s for the folder that can't be made."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jaxunet.errors import RunError\n"
        "from test_checkpoint import saved\n"
        "try: saved(Path(sys.argv[1]), 1)\n"
        "except RunError as error: sys.exit(f'refused: {error}')\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "disk" / "checkpoints")]
    start = time.monotonic()
    beside = str(Path(__file__).parents[1] / "runs")
    with mock.patch.dict("os.environ", PYTHONPATH=":".join([beside, *sys.path])):
        [(status, output)] = on_a_small_disk("9m,nr_inodes=6", tmp_path / "disk", words)
    assert status == 1
    assert re.search("refused: A checkpoint could not be .*: No inodes left", output), output
    assert time.monotonic() - start < 120


def test_a_disk_that_is_full_while_preparing_keeps_what_was_prepared(tmp_path):
    disk = tmp_path / "disk"
    words = ("--data.image-size", 16, "--data.prepared-dir", disk / "data")
    first = (*words, "--data.synthetic-train", 8, "--data.synthetic-validation", 8)
    second = (*words, "--data.synthetic-train", 1500)
    (status, output), (full_status, full), (again_status, again) = on_a_small_disk(
        "1m",
        disk,
        command("prepare_data.py", "synthetic", *first),
        command("prepare_data.py", "synthetic", *second),
        command("prepare_data.py", "synthetic", *first),
    )
    assert status == 0, output
    assert full_status == 1
    assert re.search(r"disk/data/synthetic/.* cannot be written: .*No space left", full)
    assert "Traceback" not in full
    assert again_status == 0, again


@pytest.mark.parametrize("script", ["train.py", "prepare_data.py"])
def test_a_place_that_cannot_be_written_is_found_first(script, tmp_path):
    (tmp_path / "file").write_text("in the way")
    words = ["--data.prepared-dir", tmp_path / "file" / "data"]
    if script == "train.py":
        words = ["--data.prepared-dir", tmp_path / "data", "--out", tmp_path / "file" / "run"]
    else:
        words = ["synthetic", *words]
    start = time.monotonic()
    output = run(script, *words, expect=1)
    assert re.search("file/(run|data).* cannot be written", " ".join(output.split()))
    assert not (tmp_path / "data").exists()
    assert time.monotonic() - start < 60


def start_training(tmp_path: Path) -> subprocess.Popen:
    """A run of many epochs, once it has made its first step."""
    words = [*SMALL, "--data.prepared-dir", tmp_path / "data", "--train.epochs", 100_000]
    process = subprocess.Popen(
        command("train.py", *words, "--out", tmp_path / "run"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_within_seconds(number, tmp_path):
    process = start_training(tmp_path)
    second = run("train.py", *SMALL, "--out", tmp_path / "run", "--resume", expect=1)
    assert "is in use by another run" in second
    process.send_signal(number)
    start = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert process.returncode == 128 + number
    found = re.search(rf"Stopped by {number.name} after step (\d+) .*--resume", said)
    assert found, said
    assert trained.load(tmp_path / "run").step == int(found[1])


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = start_training(tmp_path)
    # The first waits for the step and the save; the two come too close for either.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.wait(10)
    assert process.returncode in (-signal.SIGINT, 130)
