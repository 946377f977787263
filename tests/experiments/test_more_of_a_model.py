"""Ensembles, thresholds, temperatures and clean-up: of the library, and of the scripts."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from bad_input.ground import run
from PIL import Image
from scipy.special import expit, logit

import jaxunet
from jaxunet.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxunet.config_json import to_dict
from jaxunet.data import prepare
from jaxunet.errors import ConfigError, DataError, RunError
from jaxunet.learning.clean_up import clean_up
from jaxunet.learning.steps import init_state, make_recipe, state_from_variables
from jaxunet.runs.calibration import FILE
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.evaluation import describe_split
from jaxunet.runs.journal import Position


def made(run: Path, config: Config, seed: int) -> None:
    """A run with weights out of a hat, at step 12."""
    recipe, rng = make_recipe(config), np.random.default_rng(seed)

    def drawn(path, leaf):
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        scale = 2.5 / np.sqrt(np.prod(leaf.shape[:-1])) if "kernel" in name else 0.2
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    like = jax.eval_shape(partial(init_state, recipe)).variables
    variables = jax.tree_util.tree_map_with_path(drawn, like)
    state = jax.tree.map(np.asarray, state_from_variables(recipe, variables))
    dataset = describe_split(prepare(config.data, progress=False), "train", 16)
    with RunDirectory(run, config, resume=False) as directory:
        checkpoints = Checkpoints(run / "checkpoints", config.train.best_metric)
        progress = {**vars(Position()), "config": to_dict(config)}
        checkpoints.save(state.replace(step=np.int32(12)), progress)
        checkpoints.wait()
        checkpoints.close()
        directory.write_config(dataset)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two runs of different design, a and b, on the same synthetic pictures."""
    place = tmp_path_factory.mktemp("runs")
    config = Config(
        data=DataConfig(
            prepared_dir=place / "prepared",
            synthetic_train=8,
            synthetic_validation=9,
            image_size=16,
            stored_size=16,
        ),
        model=ModelConfig(width=3, depth=2),
        train=TrainConfig(batch_size=8, eval_batch_size=8),
    )
    made(place / "a", config, 2)
    other = ModelConfig(width=2, depth=2, norm="batch")
    made(place / "b", dataclasses.replace(config, model=other), 5)
    return place, config


@pytest.fixture
def world(sound, tmp_path):
    """The same, of the test's own."""
    for name in ("a", "b"):
        shutil.copytree(sound[0] / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def pictures(sound):
    """Images and masks of the validation split."""
    source = prepare(sound[1].data, progress=False).source("validation")
    examples = [source[index] for index in range(len(source))]
    return np.stack([e["image"] for e in examples]), np.stack([e["mask"] for e in examples])


@pytest.fixture(scope="module")
def maps(sound, pictures):
    """Probabilities of a, of b, and of both, by the library, picture by picture."""
    place, _ = sound
    models = map(jaxunet.load, (place / "a", place / "b", [place / "a", place / "b"]))
    return [np.stack([m.probabilities(image) for image in pictures[0]]) for m in models]


def dice_of(probabilities, threshold, truth, clean=False):
    """Dice of each image, by hand."""
    found = []
    for each, true in zip(probabilities, truth[..., 0] > 0, strict=True):
        mask = each > threshold
        if clean:
            mask = clean_up(np.uint8(255) * mask) > 0
        whole = mask.sum() + true.sum()
        found.append(2 * (mask & true).sum() / whole if whole else 1.0)
    return np.array(found)


def edit(run, **changes):
    """Other configuration in a run's record."""
    path = run / "config.json"
    record = json.loads(path.read_text())
    for name, value in changes.items():
        section, field = name.split("__")
        record["config"][section][field] = value
    path.write_text(json.dumps(record))


def scripted(words, expect=0):
    status, output = run(words)
    assert status == expect, output
    assert "Traceback" not in output
    return " ".join(output.split())


def test_an_ensemble_has_the_mean_of_its_runs_probabilities(sound, pictures, maps):
    one, other, both = maps
    assert np.abs(one - other).max() > 0.05
    np.testing.assert_allclose(both, (one + other) / 2, rtol=2e-5)
    found = jaxunet.evaluate([sound[0] / "a", str(sound[0] / "b")], show_progress=False)
    dice = dice_of(both, 0.5, pictures[1])
    assert found["scores"]["per_image"]["dice"] == pytest.approx(dice.mean())
    lesion = pictures[1][..., 0] > 0
    bins = found["calibration"]["bins"]
    assert sum(each["pixels"] for each in bins) == lesion.size
    last = bins[-1]
    here = both >= np.float32(14 / 15)
    assert last["pixels"] == here.sum()
    if here.any():
        assert last["lesion_share"] == pytest.approx(lesion[here].mean())


def test_a_temperature_divides_the_logit_of_the_mean_and_leaves_the_mask(world, pictures, maps):
    warm = jaxunet.load([world / "a", world / "b"], temperature=2.5)
    image = pictures[0][0]
    expected = expit(logit(maps[2][0].astype(float)) / 2.5)
    np.testing.assert_allclose(warm.probabilities(image), expected, rtol=1e-4)
    np.testing.assert_array_equal(warm.predict(image) > 0, maps[2][0] > 0.5)
    cleaned = warm.predict(image, clean=True)
    np.testing.assert_array_equal(cleaned, clean_up(warm.predict(image)))


def test_the_threshold_is_the_best_on_validation_and_is_kept(world, sound, pictures, maps):
    thresholds = np.arange(1, 100) / 100
    dice = [dice_of(maps[0], t, pictures[1]).mean() for t in thresholds]
    model = jaxunet.load(world / "a", threshold="auto", temperature="auto")
    recipe = model.trained.recipe
    kept = json.loads((world / "a" / FILE).read_text())
    fit = kept["latest"]
    assert max(dice) == pytest.approx(dice[round(100 * fit["threshold"]) - 1])
    assert recipe.temperature == fit["temperature"] != 1
    moved = expit(logit(fit["threshold"]) / fit["temperature"])
    assert recipe.threshold == pytest.approx(moved)
    assert fit["fitted_on"]["split"] == "validation"
    assert fit["runs"][0]["checkpoint"] == "latest"

    # Kept, it needs no data; for other weights it is fitted anew.
    edit(world / "a", data__prepared_dir=str(world / "gone"), data__name="isic2018")
    again = jaxunet.load(world / "a", threshold="auto").trained.recipe
    assert (again.threshold, again.temperature) == (fit["threshold"], 1)
    edit(world / "a", data__prepared_dir=str(sound[0] / "prepared"), data__name="synthetic")
    fit["threshold"], fit["fitted_for"]["members"][0]["weights"] = 0.93, "00000000"
    (world / "a" / FILE).write_text(json.dumps(kept))
    renewed = jaxunet.load(world / "a", threshold="auto").trained.recipe
    assert renewed.threshold == again.threshold
    jaxunet.load([world / "a", world / "b"], threshold="auto")
    names = set(json.loads((world / "a" / FILE).read_text()))
    assert names == {"latest", "latest-with b"}
    (world / "a" / FILE).write_text('{"latest": {"threshold": 2}}')
    with pytest.raises(RunError, match=r"calibration\.json cannot be read"):
        jaxunet.load(world / "a", threshold="auto")


def photographs(folder, seed, count=6):
    """Pictures and masks out of a hat, for `data.name folder`."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([seed, number, split == "val"])
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / "images" / f"{split}{number}.png")
            mask = Image.fromarray(np.uint8(255) * (pixels[..., 0] > 128))
            mask.save(folder / split / "masks" / f"{split}{number}.png")
    return folder


def test_what_is_auto_is_fitted_on_the_runs_own_data_wherever_they_are_now(sound, tmp_path):
    own, elsewhere = photographs(tmp_path / "own", 0), tmp_path / "elsewhere"
    data = DataConfig(
        name="folder", dir=own, prepared_dir=tmp_path / "there", image_size=16, stored_size=16
    )
    made(tmp_path / "run", dataclasses.replace(sound[1], data=data), 2)

    def fitted_on():
        found = json.loads((tmp_path / "run" / FILE).read_text())["latest"]
        (tmp_path / "run" / FILE).unlink()
        return found["fitted_on"]["fingerprint"]

    fingerprint = prepare(data, progress=False).fingerprint
    other = dataclasses.replace(data, dir=photographs(tmp_path / "other", 1))
    jaxunet.evaluate(tmp_path / "run", data=other, threshold="auto", show_progress=False)
    assert fitted_on() == fingerprint != prepare(other, progress=False).fingerprint

    # The size they are stored at is no part of what they are.
    native = dataclasses.replace(data, stored_size="native")
    jaxunet.evaluate(tmp_path / "run", data=native, threshold="auto", show_progress=False)
    assert fitted_on() == fingerprint

    own.rename(elsewhere)
    shutil.rmtree(tmp_path / "there")
    words = ["evaluate.py", tmp_path / "run", "--threshold", "auto"]
    assert str(own) in scripted(words, expect=1)
    scripted([*words, "--data.dir", elsewhere])
    assert fitted_on() == fingerprint


def test_runs_that_do_not_go_together_are_refused(world):
    both = [world / "a", world / "b"]
    with pytest.raises(ConfigError, match="is given twice"):
        jaxunet.load([world / "a", world / "b" / ".." / "a"])
    with pytest.raises(ConfigError, match="name at least one run"):
        jaxunet.load([])
    with pytest.raises(ConfigError, match="threshold is 1"):
        jaxunet.load(world / "a", threshold=1.0)
    with pytest.raises(ConfigError, match="temperature is 0"):
        jaxunet.load(world / "a", temperature=0.0)
    edit(world / "b", train__threshold=0.4)
    with pytest.raises(ConfigError, match=r"thresholds differ \(0\.5 of .*a, 0\.4 of .*b\)"):
        jaxunet.load(both)
    edit(world / "b", data__validation_split="train[:8]")
    with pytest.raises(ConfigError, match="another may have been trained on"):
        jaxunet.load(both, threshold="auto")
    edit(world / "b", data__image_size=32)
    with pytest.raises(ConfigError, match=r"a sees pictures at 16 px and .*b at 32 px"):
        jaxunet.load(both)
    edit(world / "a", data__synthetic_train=40)
    with pytest.raises(DataError, match="bring the data back, or give numbers"):
        jaxunet.load(world / "a", threshold="auto")


def test_the_scripts_take_several_runs(world, pictures, maps):
    one, other = world / "a", world / "b"
    words = ["evaluate.py", one, other, "--clean", "--threshold", "0.4"]
    assert "belong into none of them: give --out" in scripted(words, expect=1)
    scripted([*words, "--reliability", "--out", world / "out"])
    found = json.loads(
        (world / "out" / "evaluation-validation-threshold-0.4-clean.json").read_text()
    )
    assert [each["run"] for each in found["runs"]] == [str(one), str(other)]
    assert found["runs"][1]["step"] == 12
    dice = dice_of(maps[2], 0.4, pictures[1], clean=True)
    assert found["scores"]["per_image"]["dice"] == pytest.approx(dice.mean())
    assert dice.mean() != dice_of(maps[2], 0.4, pictures[1]).mean()
    picture = world / "out" / "evaluation-validation-threshold-0.4-clean-reliability.png"
    assert np.asarray(Image.open(picture).convert("RGB")).std() > 10
    swapped = ["evaluate.py", other, one, *words[3:], "--out", world / "out"]
    assert "holds the scores of other runs" in scripted(swapped, expect=1)

    Image.fromarray(pictures[0][0]).save(world / "x.png")
    words = ["predict.py", one, other, world / "x.png", "--out", world / "masks"]
    assert "an ensemble of 2 runs" in scripted([*words, "--threshold", "auto"])
    threshold = json.loads((one / FILE).read_text())["latest-with b"]["threshold"]
    mask = np.asarray(Image.open(world / "masks" / "x_segmentation.png"))
    np.testing.assert_array_equal(mask > 0, maps[2][0] > threshold)


def test_gains_are_differences_image_by_image(world, pictures, maps):
    output = scripted(["gains.py", world / "a", world / "b", "--out", world / "out"])
    found = json.loads((world / "out" / "gains-validation.json").read_text())
    ways = {way["name"]: way for way in found["ways"]}
    names = ["as is", "views flips", "views d4", "ensemble of 2", "threshold auto", "clean"]
    assert list(ways) == [*names, "temperature auto", "all of them"]
    truth = pictures[1]
    before = dice_of(maps[0], 0.5, truth)
    threshold = ways["threshold auto"]["threshold"]
    for name, dice in {
        "as is": before,
        "ensemble of 2": dice_of(maps[2], 0.5, truth),
        "threshold auto": dice_of(maps[0], threshold, truth),
        "clean": dice_of(maps[0], 0.5, truth, clean=True),
        "temperature auto": before,
    }.items():
        score = ways[name]["scores"]["dice"]
        assert score["first"] == pytest.approx(dice.mean())
        assert score["difference"] == pytest.approx((dice - before).mean())
        assert score["interval"][0] <= score["difference"] <= score["interval"][1]
    averaging = found["averaging"]["scores"]
    mean = (before + dice_of(maps[1], 0.5, truth)) / 2
    gained = dice_of(maps[2], 0.5, truth) - mean
    assert averaging["dice"]["second"] == pytest.approx(mean.mean())
    assert averaging["dice"]["difference"] == pytest.approx(gained.mean())
    low, high = averaging["dice"]["interval"]
    assert gained.min() <= low < gained.mean() < high <= gained.max()
    assert averaging["cross_entropy"]["difference"] < 0  # it is convex
    assert "ensemble of 2 less the mean of its runs" in output
    entropy = ways["temperature auto"]["scores"]["cross_entropy"]
    assert entropy["difference"] < 0
    lesion = truth[..., 0] > 0
    right = np.where(lesion, maps[0], 1 - maps[0].astype(float))
    exact = -np.log(np.maximum(right, 1e-8)).mean()  # some are as good as 0 in float32
    assert exact <= entropy["second"] < 1.03 * exact
    assert "these same pictures" in output
    assert "these same pictures" in found["note"]
    status, output = run(["gains.py", world / "b", world / "a", "--out", world / "out"])
    assert status == 1
    assert "gains-validation.json holds the scores of other runs" in output
