"""`import jaxunet`: light, complete, and its docstrings' examples work."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import jaxunet
from jaxunet import Config, DataConfig, DataError, ModelConfig, RunError, TrainConfig

CONFIG = Config(
    data=DataConfig(image_size=16, synthetic_train=8, synthetic_validation=3),
    model=ModelConfig(width=2, depth=2, init="he"),
    train=TrainConfig(epochs=1, batch_size=8, eval_batch_size=8),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run `runs/a`, trained through the front door, and a photograph."""
    path = tmp_path_factory.mktemp("front")
    config = jaxunet.Config(
        DataConfig(**{**vars(CONFIG.data), "prepared_dir": path / "prepared"}),
        CONFIG.model,
        CONFIG.optimizer,
        CONFIG.train,
    )
    jaxunet.train(
        config, jaxunet.prepare(config.data), path / "runs" / "a", show_progress=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (37, 21, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path / "photo.png")
    return path


def test_importing_it_brings_no_tensorflow_no_pytorch_no_matplotlib():
    code = (
        "import sys, json, jaxunet; "
        "print(json.dumps([m for m in ('tensorflow', 'torch', 'matplotlib', 'jax', "
        "'tensorflow_datasets') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == [], done.stderr


def test_every_name_that_it_promises_is_there():
    for name in jaxunet.__all__:
        assert getattr(jaxunet, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxunet.nothing


def test_a_mask_is_that_of_the_predict_script(place):
    from bad_input.ground import run

    photo = place / "photo.png"
    status, output = run(["predict.py", place / "runs" / "a", photo, "--out", place / "masks"])
    assert status == 0, output
    model = jaxunet.load(place / "runs" / "a")
    found = model.predict(np.asarray(PIL.Image.open(photo)))
    expected = np.asarray(PIL.Image.open(place / "masks" / "photo_segmentation.png"))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(DataError, match=r"float64\[2, 2\], but must be uint8"):
        model.predict(np.zeros((2, 2)))


def test_a_model_that_overflows_gives_no_mask(place):
    model = jaxunet.load(place / "runs" / "a")
    vars(model)["_compiled"] = lambda x: np.full((*x.shape[:3], 1), np.nan, np.float32)
    picture = np.zeros((4, 4, 3), np.uint8)
    for ask in (model.predict, model.probabilities):
        with pytest.raises(RunError, match="What the model makes of the picture is not finite"):
            ask(picture)


def test_scores_are_those_of_the_run(place):
    summary = json.loads((place / "runs" / "a" / "summary.json").read_text())
    assert jaxunet.evaluate(place / "runs" / "a")["scores"] == summary["scores"]


def test_the_examples_of_the_docstrings_run(place, monkeypatch):
    monkeypatch.chdir(place)
    PIL.Image.open(place / "photo.png").save(place / "photo.jpg")
    model = jaxunet.load("runs/a")
    names = {"jaxunet": jaxunet, "np": np, "PIL": PIL, "config": model.config}
    found = 0
    for each in (
        jaxunet.prepare,
        jaxunet.train,
        jaxunet.evaluate,
        jaxunet.load,
        type(model).predict,
        jaxunet.make_unet,
        jaxunet.Config,
    ):
        lines = [
            line.strip()[4:]
            for line in (inspect.getdoc(each) or "").splitlines()
            if line.strip().startswith(">>> ")
        ]
        assert lines, each
        for line in lines:
            line = line.replace('"runs/a")', '"runs/b")') if each is jaxunet.train else line
            exec(compile(ast.parse(line), str(each), "exec"), names)
            found += 1
    assert found >= 7
    assert Path("runs/b/summary.json").exists()
