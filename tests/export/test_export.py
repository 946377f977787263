"""Exported models beside the model itself, in processes without jaxunet (ONNX: without JAX)."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import pytest
import yaml
from drawn_model import SIDE, model_of
from PIL import Image
from scripts import SMALL
from scripts import run as run_script
from tiny_encoder import TINY, tiny_encoder

from jaxunet.bench.exported import config_of, measure_exported
from jaxunet.bench.setting import Setting, Timing
from jaxunet.config import Config, ModelConfig, TrainConfig
from jaxunet.errors import ConfigError, DataError, RunError
from jaxunet.export.conversion import add_program
from jaxunet.export.files import export
from jaxunet.export.graph import Graph, Name
from jaxunet.export.onnx_file import make_onnx, write_onnx
from jaxunet.export.program import program_of
from jaxunet.export.stablehlo import PLATFORMS, make_stablehlo
from jaxunet.inference.model import Model, load
from jaxunet.learning.steps import predict_step
from jaxunet.model.portable import portable
from jaxunet.runs.loading import TrainedModel
from jaxunet.runs.loading import load as load_trained


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def ours(model: TrainedModel, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(partial(predict_step, model.recipe))(model.variables, images))


def check(model: TrainedModel) -> list[str]:
    """Probabilities within 1e-4 and masks equal but for one pixel in 10,000; the operations."""
    made = make_onnx(model, {})
    session = onnxruntime.InferenceSession(made.SerializeToString())
    images = pictures(5)
    expected = ours(model, images)
    assert expected.std() > 0.01
    for part in (slice(0, 5), slice(0, 1)):  # of any number
        (found,) = session.run(["probabilities"], {"images": images[part]})
        np.testing.assert_allclose(found, expected[part], rtol=0, atol=1e-4)
    middle = np.median(expected[0])
    assert ((found > middle) != (expected[:1] > middle)).mean() <= 1e-4
    return [node.op_type for node in made.graph.node]


@pytest.mark.parametrize(
    ("config", "views"),
    [
        (ModelConfig(width=4, depth=3, remat=True), "none"),
        (ModelConfig(width=4, depth=3, norm="batch", num_logits=2), "d4"),
        (
            ModelConfig(width=4, depth=3, norm="group", upsampling="bilinear", skip="pad"),
            "flips",
        ),
    ],
    ids=["reference", "two logits in eight views", "bilinear"],
)
def test_onnx_gives_the_models_probabilities(config: ModelConfig, views: str) -> None:
    kinds = check(model_of(config, views))
    assert kinds.count("Conv") == 2 * (2 * config.depth - 1) + 1
    assert kinds.count("ConvTranspose") == (
        config.depth - 1 if config.upsampling == "transposed" else 0
    )


def test_onnx_gives_the_probabilities_of_an_ensemble_at_a_temperature() -> None:
    one = model_of(ModelConfig(width=4, depth=2), "flips")
    other = model_of(ModelConfig(width=6, depth=3))
    recipe = replace(one.recipe, others=(other.recipe.model,), temperature=1.7)
    check(TrainedModel(recipe, (one.variables, other.variables), one.members))


def test_onnx_gives_an_efficientnets_probabilities() -> None:
    with tiny_encoder():
        kinds = check(model_of(replace(TINY, decoder_width=4)))
    assert kinds.count("Conv") > 20


def test_onnx_gives_a_resnets_probabilities() -> None:
    check(model_of(ModelConfig(encoder="resnet18", decoder_width=2, norm="batch")))


def test_onnx_resizes_pictures_as_prediction_does(tmp_path: Path) -> None:
    model = model_of(ModelConfig(width=4, depth=2))
    said = {"use": "not a medical device", "threshold": "0.5"}
    write_onnx(make_onnx(model, said, native=True), tmp_path / "unet.onnx")
    whole = Model(model)
    rng = np.random.default_rng(2)
    shapes = [(61, 97), (9, 40), (22, 22), (300, 150)]
    for number, (height, width) in enumerate(shapes):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        np.savez(tmp_path / f"{number}.npz", x=picture, y=whole.probabilities(picture))
    code = """
import numpy as np, onnxruntime, sys
session = onnxruntime.InferenceSession("unet.onnx")
assert not {"jax", "jaxunet"} & set(sys.modules)
for number in range(4):
    pair = np.load(f"{number}.npz")
    (found,) = session.run(["probability"], {"image": pair["x"]})
    assert found.shape == pair["y"].shape
    # Random weights make much of a pixel that is rounded otherwise; trained ones, below, don't.
    assert ((found > 0.5) != (pair["y"] > 0.5)).mean() <= 5e-3
    assert np.abs(found - pair["y"]).mean() < 1e-3
print(session.get_modelmeta().custom_metadata_map)
"""
    output = in_a_process(code, tmp_path)
    assert "'use': 'not a medical device'" in output


def test_stablehlo_is_for_all_platforms_and_the_same_to_the_bit(tmp_path: Path) -> None:
    model = model_of(ModelConfig(width=4, depth=3), "flips")
    (tmp_path / "unet.stablehlo").write_bytes(make_stablehlo(model, {"threshold": "0.5"}))
    np.save(tmp_path / "x.npy", pictures(3))
    code = """
import jax, json, numpy as np, sys
from pathlib import Path
program = jax.export.deserialize(bytearray(Path("unet.stablehlo").read_bytes()))
np.save("y.npy", program.call(np.load("x.npy")))
assert program.call(np.load("x.npy")[:1]).shape[0] == 1
assert "jaxunet" not in sys.modules
print(json.dumps([program.platforms, json.loads(program.fun_name)]))
"""
    platforms, said = json.loads(in_a_process(code, tmp_path))
    assert (tuple(platforms), said) == (PLATFORMS, {"threshold": "0.5"})
    found = np.load(tmp_path / "y.npy")
    with portable():
        same = np.asarray(jax.jit(program_of(model))(pictures(3)))
    np.testing.assert_array_equal(found, same)
    np.testing.assert_allclose(found, ours(model, pictures(3)), rtol=0, atol=1e-5)


def test_the_script_exports_a_run_and_writes_its_card(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_script("train.py", "--out", run, *SMALL, "--data.prepared-dir", tmp_path / "data")
    head, text = read_card(run)
    assert head["license"] == "apache-2.0"
    summary = json.loads((run / "summary.json").read_text())
    dice = summary["scores"]["per_image"]["dice"]
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(dice, 4)
    assert f"| synthetic validation (`summary.json`) | 6 | 6 | {dice:.4f} (" in text
    assert "not a medical device" in text
    assert "python experiments/train.py --out" in text

    unet = tmp_path / "unet.onnx"
    output = run_script("export.py", run, "--format", "onnx", "--native", "--out", unet)
    assert "not a medical device" in output
    session = onnxruntime.InferenceSession(unet)
    said = session.get_modelmeta().custom_metadata_map
    assert (said["step"], said["threshold"], said["image_size"]) == ("6", "0.5", "16")
    (result,) = json.loads(said["results"])
    assert result["scores"]["dice"] == dice
    model = load(run)
    picture = np.asarray(Image.fromarray(pictures(1)[0]).resize((120, 90)))
    (found,) = session.run(None, {"image": picture})
    assert (np.where(found > 0.5, 255, 0) != model.predict(picture)).mean() <= 1e-3

    files = [tmp_path / "batches.onnx", tmp_path / "unet.stablehlo"]
    for file, kind in zip(files, ("onnx", "stablehlo"), strict=True):
        export(lambda: load_trained(run), file, kind)
    program = jax.export.deserialize(bytearray(files[1].read_bytes()))
    assert json.loads(program.fun_name)["threshold"] == "0.5"

    with pytest.raises(DataError, match="without --native"):
        config_of(Config(), unet)
    for file in files:  # timed for its own model, not that of the benchmark's options
        config = config_of(Config(train=TrainConfig(batch_size=2)), file)
        assert (config.model, config.data.image_size) == (model.config.model, 16)
        timing = Timing(rounds=2, seconds=0.01)
        found = measure_exported(file, Setting(config, "jit", 1), timing)
        assert found["exported_over_jaxunet"]["median"] > 0
        assert found["exported"]["images_per_second"] > 0
    unet.write_bytes(b"x")
    with pytest.raises(DataError, match="is no file of experiments/export"):
        config_of(Config(), unet.rename(tmp_path / "odd"))


def test_what_can_not_be_exported_is_said_first(tmp_path: Path) -> None:
    def unread() -> TrainedModel:
        raise AssertionError

    with pytest.raises(ConfigError, match=r"--native is --format onnx's"):
        export(unread, tmp_path / "a", "stablehlo", native=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/nowhere cannot be written to"):
        export(unread, tmp_path / "file" / "nowhere" / "a", "onnx")


def read_card(run: Path) -> tuple[dict, str]:
    _, head, text = (run / "MODEL_CARD.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_an_operation_without_a_form_is_named() -> None:
    program = jax.make_jaxpr(lambda x: jax.lax.erf_inv(x))(np.float32(0.5))
    with pytest.raises(ConfigError, match=r"its operation 'erf_inv' in the whole has no form"):
        add_program(Graph(), program, [Name("x")])


def in_a_process(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
