"""evaluate.py: on the run's own data, on others, and what it writes where."""

import csv
import dataclasses
import json
import shutil
import sys
import zipfile

import jax
import numpy as np
import pytest
from bad_input.ground import SCRIPTS, run
from PIL import Image
from small_data import encoded, half_mask, picture, write_files

import jaxunet
from jaxunet import files
from jaxunet.bench.flops import forward_flops
from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import RunError
from jaxunet.learning.boundary import boundary_scores
from jaxunet.runs.loading import compile_probabilities, load
from jaxunet.runs.record import load_config
from jaxunet.runs.training import train


def write_pairs(folder, seeds):
    write_files(folder / "images", {f"{n}.png": encoded(picture(n, 16, 16)) for n in seeds})
    write_files(folder / "masks", {f"{n}.png": encoded(half_mask(16, 16)) for n in seeds})


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """own/ with a run trained on it, and other/, of the same layout."""
    world = tmp_path_factory.mktemp("world")
    splits = {"train": range(8), "validation": range(8, 10), "test": range(10, 13)}
    for split, seeds in splits.items():
        write_pairs(world / "own" / split, seeds)
    write_pairs(world / "other" / "test", range(20, 25))
    config = Config(
        data=DataConfig(
            name="folder",
            dir=world / "own",
            prepared_dir=world / "prepared",
            image_size=16,
            stored_size=16,
        ),
        model=ModelConfig(width=2, depth=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        # Low enough that there is lesion to be found, after so little training.
        train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8, threshold=0.3),
    )
    data = prepare(config.data, progress=False)
    train(config, data, world / "run", show_progress=False)
    return world, config


@pytest.fixture
def world(sound, tmp_path):
    """The same, of the test's own."""
    place, _ = sound
    shutil.copytree(place, tmp_path / "world")
    path = tmp_path / "world" / "run" / "config.json"
    path.write_text(path.read_text().replace(str(place), str(tmp_path / "world")))
    return tmp_path / "world"


def evaluate(world, *words, expect=0):
    status, output = run(["evaluate.py", world / "run", *words])
    assert status == expect, output
    assert "Traceback" not in output
    return " ".join(output.split())


def written(folder, name):
    return json.loads((folder / f"evaluation-{name}.json").read_text())


def test_other_data_are_scored_with_the_runs_model_and_both_are_named(world, sound):
    evaluate(world, "--data.dir", world / "other", "--split", "test")
    found = written(world / "run", "folder-test")
    own = json.loads((world / "run" / "config.json").read_text())["dataset"]
    config = dataclasses.replace(sound[1].data, dir=world / "other")
    other = prepare(
        dataclasses.replace(config, prepared_dir=world / "prepared"), progress=False
    )
    assert found["trained_on"] == own
    assert found["dataset"]["fingerprint"] == other.fingerprint != own["fingerprint"]
    assert (found["dataset"]["name"], found["dataset"]["count"]) == ("folder", 5)
    assert not (world / "run" / "evaluation-test.json").exists()

    model = load(world / "run")
    probabilities = compile_probabilities(make_strategy("pmap"), model.recipe, model.variables)
    images = np.zeros((8, 16, 16, 3), np.uint8)
    images[:5] = [picture(seed, 16, 16) for seed in range(20, 25)]
    predicted = probabilities(images)[:5] > 0.3
    truth = np.repeat(half_mask(16, 16)[None, :, :, None] > 0, 5, axis=0)
    both = (predicted & truth).sum()
    dice = 2 * both / (predicted.sum() + truth.sum())
    assert found["scores"]["pooled"]["dice"] == pytest.approx(dice)
    assert 0 < dice < 1


def test_another_kind_of_data_starts_from_its_own_defaults_but_for_the_models(world):
    words = ("--data.synthetic-train", 8, "--data.synthetic-validation", 4)
    evaluate(world, "--data.name", "synthetic", *words, "--split", "test")
    found = written(world / "run", "synthetic-test")
    data = found["config"]["data"]
    assert (data["dir"], data["image_size"], data["stored_size"]) == (None, 16, 16)
    assert data["prepared_dir"] == str(world / "prepared")
    assert (found["dataset"]["count"], found["trained_on"]["name"]) == (4, "folder")
    output = evaluate(world, "--data.image-size", 32, expect=2)
    assert "Unrecognized options: --data.image-size" in output


def test_every_field_of_the_data_can_be_given_but_those_of_the_model(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    import evaluate as script

    _, output = run(["evaluate.py", "--help"])
    for field in dataclasses.fields(DataConfig):
        option = f"--data.{field.name.replace('_', '-')}"
        assert (option in output) != (field.name in script.OF_RUN)


def test_own_data_that_changed_are_refused_unless_they_are_given(world):
    evaluate(world, "--split", "test")
    before = written(world / "run", "test")
    write_pairs(world / "own" / "test", [13])
    output = evaluate(world, "--split", "test", expect=1)
    assert "run, which was trained on folder from" in output
    assert before["dataset"]["fingerprint"] in output
    assert "--data.dir" in output
    assert written(world / "run", "test") == before
    evaluate(world, "--split", "test", "--data.dir", world / "own")
    assert written(world / "run", "test") == before
    assert written(world / "run", "folder-test")["dataset"]["count"] == 4


def test_data_that_only_moved_are_the_runs_own(world):
    (world / "own").rename(world / "moved")
    evaluate(world, "--data.dir", world / "moved", "--split", "test")
    assert written(world / "run", "test")["dataset"]["count"] == 3


def test_scores_of_one_folder_do_not_replace_anothers(world):
    evaluate(world, "--data.dir", world / "other", "--split", "test")
    before = written(world / "run", "folder-test")
    write_pairs(world / "third" / "test", range(30, 32))
    words = ("--data.dir", world / "third", "--split", "test")
    output = evaluate(world, *words, expect=1)
    assert "evaluation-folder-test.json holds the scores of other data" in output
    evaluate(world, *words, "--out", world / "elsewhere")
    assert written(world / "elsewhere", "folder-test")["dataset"]["count"] == 2
    assert written(world / "run", "folder-test") == before
    evaluate(world, "--data.dir", world / "other", "--split", "test")  # the same again


def test_slices_and_checkpoints_have_files_of_their_own(world):
    evaluate(world, "--split", "test")
    evaluate(world, "--split", "test", "--checkpoint", "best")
    evaluate(world, "--split", "test[:1]")
    evaluate(world, "--split", "test[:67%]")
    names = {path.name for path in (world / "run").glob("evaluation-*.json")}
    assert names == {
        *("evaluation-test.json", "evaluation-test-best.json"),
        *("evaluation-test_.1.json", "evaluation-test_.67%.json"),
    }
    assert written(world / "run", "test_.67%")["dataset"]["count"] == 2


def test_no_two_scorings_share_a_name(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    from model_options import ModelOptions

    edges = ("", "1", "10", "-10", "10%", "-10%")
    splits = [f"{base}[{a}:{b}]" for base in ("test", "train") for a in edges for b in edges]
    splits += ["test", "train", "train+test", "train[:1]+test", "train+test[:1]", "../test"]
    names = [
        options.file_name(split, native=native, other=other)
        for split in splits
        for native in (False, True)
        for other in (None, "folder", "isic2018", "synthetic")
        for options in (
            ModelOptions(),
            ModelOptions(checkpoint="best"),
            ModelOptions(views="flips", clean=True),
            ModelOptions(checkpoint="best", views="d4"),
            ModelOptions(threshold="auto"),
            ModelOptions(threshold=0.4),
            ModelOptions(temperature="auto", clean=True),
            ModelOptions(temperature=2.0),
        )
    ]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)
    assert ModelOptions().file_name("test", native=True) == "native-test"


def test_native_scores_are_of_the_masks_that_a_zip_holds_and_no_others(world, sound):
    words = ("--native", "--zip", "--split", "test", "--tolerance", 1.5)
    stale = world / "run" / "native-test" / "zzz_segmentation.png"
    write_files(stale.parent, {stale.name: encoded(half_mask())})
    evaluate(world, *words)
    with zipfile.ZipFile(world / "run" / "native-test.zip") as archive:
        assert archive.namelist() == [f"{n}_segmentation.png" for n in (10, 11, 12)]
    prepared = json.loads((world / "run" / "config.json").read_text())["dataset"]
    found = written(world / "run", "native-test-tolerance-1.5")
    assert found["dataset"]["fingerprint"] == prepared["fingerprint"]
    # The boundary's scores are those of the masks that were written.
    written_files = [stale.parent / f"{n}_segmentation.png" for n in (10, 11, 12)]
    masks = [np.array(Image.open(file)) > 128 for file in written_files]
    each = np.array([boundary_scores(mask, half_mask(16, 16) > 0, 1.5) for mask in masks])
    assert each[:, 0].min() > 1  # half of each is lesion, and not found so
    for name, column in zip(("hd95", "nsd"), each.T, strict=True):
        value = found["scores"]["per_image"][name]
        assert value == pytest.approx(column.mean())
        low, high = found["intervals"]["per_image"][name]
        assert low - 1e-9 <= value <= high + 1e-9
        with (world / "run" / "evaluation-native-test-tolerance-1.5.csv").open() as file:
            lines = [float(line[name]) for line in csv.DictReader(file)]
        assert lines == pytest.approx(column, abs=1e-6)
    assert found["tolerance"] == 1.5
    assert found["model"]["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(load(world / "run").variables["params"])
    )
    assert found["model"]["gflops"] == forward_flops(sound[1].model, 16, 16) / 1e9
    evaluate(world, *words, "--data.dir", world / "other")
    with zipfile.ZipFile(world / "run" / "native-folder-test.zip") as archive:
        assert archive.namelist() == [f"{n}_segmentation.png" for n in range(20, 25)]
    assert "add --native" in evaluate(world, "--zip", expect=1)
    assert "add --native" in evaluate(world, "--tolerance", 3, expect=1)


def test_a_run_that_cannot_be_written_to_is_said_first_and_scored_elsewhere(world, monkeypatch):
    real = files.write_atomically

    def read_only(path, contents):
        if path.parent == world / "run":
            raise OSError(30, "Read-only file system")
        real(path, contents)

    monkeypatch.setattr(files, "write_atomically", read_only)
    shutil.rmtree(world / "prepared")
    output = evaluate(world, "--split", "test", expect=1)
    assert f"error: RUN {world}/run cannot be written to: Read-only file system." in output
    assert "choose another place" in output
    assert not (world / "prepared").exists()  # nothing was done before
    evaluate(world, "--split", "test", f"--out={world}/scores")
    assert written(world / "scores", "test")["dataset"]["count"] == 3
    assert not list((world / "run").glob("evaluation-*"))


def test_of_several_processes_each_says_what_it_scores_and_with_what(world, monkeypatch):
    said = {}

    def differ(here, ignore):
        said.update(here, ignore=ignore)
        raise RunError("Process 1 has other data.")

    monkeypatch.setattr("jaxunet.devices.distributed.initialize", lambda: None)
    monkeypatch.setattr("jaxunet.runs.evaluation.same_everywhere", differ)
    output = evaluate(world, "--distributed", "--split", "test", expect=1)
    assert "error: Process 1 has other data." in output
    own = json.loads((world / "run" / "config.json").read_text())["dataset"]
    assert said["data"]["fingerprint"] == own["fingerprint"]
    assert said["config"]["model"]["width"] == 2
    assert not list((world / "run").glob("evaluation-*"))


def test_pictures_are_predicted_up_to_the_runs_own_limit(world):
    path = world / "run" / "config.json"
    record = json.loads(path.read_text())
    write_files(world / "large", {"a.png": encoded(picture(0, 1200, 1000))})
    words = ["predict.py", world / "run", world / "large", "--out", world / "masks"]
    for limit, status in ((1, 1), (2, 0)):
        record["config"]["data"]["max_megapixels"] = limit
        path.write_text(json.dumps(record))
        found, output = run(words)
        assert found == status, output
        assert ("1,200,000 pixels; the limit is 1,000,000" in output) == bool(status)
    assert (world / "masks" / "a_segmentation.png").exists()


def test_each_image_has_its_line_and_the_worst_are_drawn(world):
    output = evaluate(world, "--split", "test", "--worst", 2)
    found = written(world / "run", "test")
    with (world / "run" / "evaluation-test.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)
    assert len(lines) == found["dataset"]["count"] == 3
    for name, value in found["scores"]["per_image"].items():
        mean = np.mean([float(line[name]) for line in lines])
        assert mean == pytest.approx(value, abs=1e-6)
        low, high = found["intervals"]["per_image"][name]
        assert low <= value <= high
        assert f"{low:.3f}-{high:.3f}" in output
    assert sum(int(line["true_positives"]) for line in lines) > 0
    picture = np.asarray(Image.open(world / "run" / "evaluation-test-worst.png").convert("RGB"))
    assert picture.std() > 10
    output = evaluate(world, "--split", "test", "--worst", 2, "--native", expect=1)
    assert "--worst draws" in output


def test_views_have_a_file_of_their_own_and_are_those_of_the_loaded_model(world):
    evaluate(world, "--split", "test", "--views", "flips")
    found = written(world / "run", "test-flips")
    assert found["views"] == "flips"
    one, model = jaxunet.load(world / "run"), jaxunet.load(world / "run", views="flips")
    truth, both = half_mask(16, 16) > 0, np.zeros(3)
    for seed in range(10, 13):
        image = picture(seed, 16, 16)
        flips = [(), (0,), (1,), (0, 1)]
        mean = np.mean([np.flip(one.probabilities(np.flip(image, f)), f) for f in flips], 0)
        np.testing.assert_allclose(model.probabilities(image), mean, rtol=1e-4)
        lesion = mean > 0.3
        both += [(lesion & truth).sum(), lesion.sum(), truth.sum()]
    assert found["scores"]["pooled"]["dice"] == pytest.approx(2 * both[0] / (both[1] + both[2]))
    masks = world / "masks"
    image = next((world / "own" / "test" / "images").iterdir())
    status, output = run(["predict.py", world / "run", image, "--views", "d4", "--out", masks])
    assert status == 0, output
    expected = jaxunet.load(world / "run", views="d4").predict(picture(int(image.stem), 16, 16))
    np.testing.assert_array_equal(Image.open(next(masks.iterdir())), expected)


def test_two_runs_are_compared_image_by_image(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "copy")
    words = ["compare.py", world / "run", tmp_path / "copy", "--split", "test"]
    status, output = run([*words, "--out", tmp_path / "out"])
    assert status == 0, output
    found = json.loads((tmp_path / "out" / "comparison-copy-test.json").read_text())
    assert found["scores"]["dice"]["difference"] == 0
    assert found["datasets"][0] == found["datasets"][1]
    assert len(found["most_different"]) == 3
    picture = Image.open(tmp_path / "out" / "comparison-copy-test.png").convert("RGB")
    assert np.asarray(picture).std() > 10
    other = ["compare.py", tmp_path / "copy", *words[2:], "--out", tmp_path / "out"]
    status, output = run(other)
    assert status == 1
    assert "comparison-copy-test.json holds the scores of other runs" in output


def test_a_difference_is_that_of_both_scorings_and_a_picture_in_the_way_costs_no_scores(
    world, tmp_path
):
    config = load_config(world / "run")
    # Hardly trained, it says much the same of all pixels.
    settings = dataclasses.replace(config.train, seed=1, threshold=0.6)
    other = dataclasses.replace(config, train=settings)
    train(other, prepare(other.data, progress=False), tmp_path / "b", show_progress=False)
    (tmp_path / "out" / "comparison-b-test-best-clean.png").mkdir(parents=True)
    words = ("--split", "test", "--checkpoint", "best", "--clean", "--out", tmp_path / "out")
    status, output = run(["compare.py", world / "run", tmp_path / "b", *words])
    assert status == 0, output
    assert "is not drawn" in output
    found = json.loads((tmp_path / "out" / "comparison-b-test-best-clean.json").read_text())
    dice = []
    for each in (world / "run", tmp_path / "b"):
        status, output = run(["evaluate.py", each, *words[:5], "--out", tmp_path / each.name])
        assert status == 0, output
        found_in = tmp_path / each.name / "evaluation-test-best-clean.json"
        scores = json.loads(found_in.read_text())
        dice.append(scores["scores"]["per_image"]["dice"])
    assert found["scores"]["dice"]["difference"] == pytest.approx(dice[0] - dice[1])
    assert dice[0] != dice[1]


def test_images_that_only_share_their_names_are_not_compared(world, tmp_path):
    other = load_config(world / "run")
    for split, count in (("train", 8), ("validation", 2), ("test", 3)):
        names = [path.stem for path in (world / "own" / split / "images").iterdir()]
        pictures = {f"{n}.png": encoded(picture(90 + int(n), 16, 16)) for n in names}
        assert len(names) == count
        write_files(tmp_path / "own" / split / "images", pictures)
        shutil.copytree(world / "own" / split / "masks", tmp_path / "own" / split / "masks")
    data = dataclasses.replace(other.data, dir=tmp_path / "own")
    other = dataclasses.replace(other, data=data)
    train(other, prepare(data, progress=False), tmp_path / "b", show_progress=False)
    words = ["compare.py", world / "run", tmp_path / "b", "--split", "test"]
    status, output = run([*words, "--out", tmp_path / "none"])
    assert status == 1
    assert "Differing: fingerprint:" in output
    assert not list((tmp_path / "none").iterdir())
    # Nor those of a run whose own data changed.
    write_pairs(world / "own" / "test", [13])
    status, output = run(["compare.py", world / "run", world / "run", "--split", "test"])
    assert status == 1
    assert "Scores of data that changed do not compare" in " ".join(output.split())
