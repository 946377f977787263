"""The scripts as a person runs them: in a process of their own."""

import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
from bad_input import ground
from PIL import Image
from scripts import SMALL, command, environment, run


def here(*words: object, expect: int = 0) -> str:
    """The script in this process, where what only reads its options needs no start of JAX."""
    status, output = ground.run(list(words))
    assert status == expect, output
    return output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return "--data.prepared-dir", tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared):
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, run("train.py", *SMALL, *prepared, "--out", out)


def test_train_shows_epochs_scores_and_where_everything_is(trained):
    out, output = trained
    for expected in (
        r"epoch 1/2.*train loss.*Dice 0\..* s, run ends in .* s\n",
        r"epoch 2/2.* s\n",
        r"Time: .* s: start .* compilation .*cache: .* steps .* evaluation .* figures ",
        r"per image",
        r"batch of 4",
        r"pooled",
        r"predictions\.png",
        rf"Checkpoint: {out}/checkpoints/6",
        rf"Next: +python experiments/evaluate\.py {out} --split test",
    ):
        assert re.search(expected, output), f"{expected} not in {output}"
    assert json.loads((out / "summary.json").read_text())["epoch"] == 2


def test_evaluate_writes_its_scores_and_those_of_the_validation_are_trainings(trained):
    out, _ = trained
    output = run("evaluate.py", out, "--split", "validation", "--parallel", "jit")
    assert "synthetic validation (6 images)" in output
    found = json.loads((out / "evaluation-validation.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert found["scores"] == summary["scores"]
    assert found["dataset"] == summary["dataset"]


def test_predict_writes_masks_at_each_pictures_size_and_reports_what_is_none(trained, tmp_path):
    out, _ = trained
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 41, 3), np.uint8)).save(pictures / "a.jpg")
    Image.fromarray(rng.integers(0, 256, (9, 7), np.uint8)).save(pictures / "b.png")
    (pictures / "c.jpg").write_text("no picture")
    output = run(
        "predict.py", out, pictures, "--out", tmp_path / "masks", "--overlay", expect=1
    )
    assert "c.jpg" in output
    sizes = {"a": (41, 30), "b": (7, 9)}
    for name, size in sizes.items():
        mask = Image.open(tmp_path / "masks" / f"{name}_segmentation.png")
        assert (mask.size, mask.mode) == (size, "L")
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
        assert (tmp_path / "masks" / f"{name}_overlay.png").exists()


def test_a_complete_run_is_not_overwritten_but_extended_on_request(trained, prepared):
    out, _ = trained
    before = (out / "config.json").read_bytes()
    assert "complete run" in here("train.py", *SMALL, *prepared, "--out", out, expect=1)
    assert (out / "config.json").read_bytes() == before
    output = here("train.py", "--out", out, "--resume", "--model.width", 8, expect=1)
    assert "model.width: 4 -> 8" in output


def test_prepare_reports_every_problem_at_once_and_leaves_nothing(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    grey = np.full((8, 8), 7, np.uint8)
    for name in ("a", "b"):
        Image.fromarray(np.dstack([grey] * 3)).save(
            tmp_path / "data" / "images" / f"{name}.png"
        )
    Image.fromarray(grey).save(tmp_path / "data" / "masks" / "a.png")
    output = here(
        "prepare_data.py",
        "folder",
        *("--data.dir", tmp_path / "data"),
        *("--data.prepared-dir", tmp_path / "prepared"),
        expect=1,
    )
    assert re.search(r"a\.png.*7", output)
    assert "b.png" in output
    assert not any(p.is_file() for p in (tmp_path / "prepared").rglob("*.array_record*"))


def test_a_users_mistake_is_answered_in_a_paragraph(tmp_path):  # more of them in bad_input/
    output = run("train.py", "referense", "--out", tmp_path / "run", expect=1)
    assert "no preset 'referense'; did you mean 'reference'" in " ".join(output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py", "prepare_data.py"])
def test_help_explains_every_option(script):
    output = here(script, "--help")
    assert "--data.dir" in output or "--overlay" in output
    assert re.search(r"Run directory|where the source files are", output, re.IGNORECASE)


def test_a_reader_that_leaves_ends_a_script_without_a_traceback():
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does once it has seen enough
    done = subprocess.run(
        command("train.py", "--help"), stdout=writing, stderr=subprocess.PIPE, env=environment()
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
