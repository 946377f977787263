"""What a run records of its data is compared wherever it is opened."""

import json
import re
from dataclasses import replace

import pytest

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.errors import RunError
from jaxunet.provenance import disagreement
from jaxunet.runs.evaluation import describe_split
from jaxunet.runs.record import other_data, read_metrics, recorded_fingerprint
from jaxunet.runs.training import train


def differing(record, found, **options):
    return disagreement(record, found, recorded="The run a", there="the folder b", **options)


@pytest.mark.parametrize(
    ("record", "found", "said"),
    [
        ({"fingerprint": "0" * 12}, {"fingerprint": "0" * 12}, None),
        ({"fingerprint": "0" * 12}, {"fingerprint": "1" * 12}, "'000000000000' -> '1111111"),
        ({"fingerprint": "0" * 8}, {"fingerprint": "1" * 12}, None),  # of another scheme
        ({"fingerprint": "0" * 8, "counts": {"train": 3}}, {"counts": {"train": 3}}, None),
        ({"counts": {"train": 3}}, {"counts": {"train": 4}}, r"counts\.train: 3 -> 4"),
        ({"counts": {"train": 3}}, {"counts": {"train": 3, "test": 1}}, "test: None -> 1"),
        ({"counts": {"train": 3, "test": 1}}, {"counts": {"train": 3}}, "test: 1 -> None"),
        ({"git_commit": "a"}, {"git_commit": None}, None),  # unknown
        ({"git_commit": "a"}, {}, None),
        ({"data": {"dir": "a"}}, {"data": {"dir": None}}, r"data\.dir: 'a' -> None"),
    ],
)
def test_what_both_sides_state_is_compared(record, found, said):
    sentence = differing(record, found)
    if said is None:
        assert sentence is None
    else:
        assert sentence.startswith("The run a does not fit the folder b. Differing: ")
        assert re.search(said, sentence)


def test_what_may_differ_is_left_out_by_its_full_name():
    sides = {"data": {"dir": "a", "name": "x"}}, {"data": {"dir": "b", "name": "y"}}
    assert "data.name" in differing(*sides, ignore=["data.dir", "name"])
    assert "data.dir" not in differing(*sides, ignore=["data.dir", "name"])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """20 training images in batches of 8: three steps an epoch."""
    return Config(
        data=DataConfig(
            image_size=16,
            prepared_dir=tmp_path_factory.mktemp("prepared"),
            synthetic_train=20,
            synthetic_validation=4,
        ),
        model=ModelConfig(width=2, depth=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8, log_every=1),
    )


@pytest.fixture(scope="module")
def data(config):
    return prepare(config.data, progress=False)


@pytest.fixture(scope="module")
def fewer(config):
    """Other data for the same configuration: two steps an epoch."""
    return prepare(replace(config.data, synthetic_train=9), progress=False)


def longer(config, epochs):
    return replace(config, train=replace(config.train, epochs=epochs))


def test_a_run_goes_on_with_other_data_only_if_that_is_meant(config, data, fewer, tmp_path):
    run = tmp_path / "run"
    train(config, data, run, show_progress=False)
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    three = longer(config, 3)
    with pytest.raises(
        RunError, match=r"fingerprint: .*counts\.train: 20 -> 9.*--accept-other"
    ):
        train(three, fewer, run, resume=True, show_progress=False)
    changed = replace(data, fingerprint=data.fingerprint[::-1])  # as many, but others
    with pytest.raises(RunError, match="fingerprint: "):
        train(three, changed, run, resume=True, show_progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*.json*")} == before

    options = {"resume": True, "show_progress": False}
    outcome = train(three, fewer, run, accept_other_data=True, **options)
    assert (int(outcome.state.step), outcome.summary["epoch"]) == (6 + 2, 3)
    log = [(line["step"], line["epoch"]) for line in read_metrics(run / "metrics.jsonl")]
    assert dict(log) == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 3, 8: 3}
    record = json.loads((run / "config.json").read_text())
    assert record["dataset"]["counts"]["train"] == 20
    [accepted] = record["accepted_data"]
    assert accepted["dataset"]["counts"]["train"] == 9
    assert "counts.train: 20 -> 9" in accepted["why"]
    assert recorded_fingerprint(run) == fewer.fingerprint

    outcome = train(longer(config, 4), fewer, run, **options)  # which are its own now
    assert int(outcome.state.step) == 6 + 2 + 2
    assert json.loads((run / "config.json").read_text())["accepted_data"][0] == accepted
    with pytest.raises(RunError, match=r"counts\.train: 9 -> 20"):
        train(longer(config, 5), data, run, **options)


def test_data_of_another_fingerprint_are_known_when_a_run_is_scored(config, data, tmp_path):
    run = tmp_path / "run"
    train(longer(config, 1), data, run, show_progress=False)
    described = describe_split(data, "test", 16)
    assert other_data(run, described, config.data) is None
    elsewhere = replace(config.data, name="folder", dir=tmp_path)
    said = other_data(run, described | {"fingerprint": "0" * 8}, elsewhere)
    assert f"{run}, which was trained on synthetic, does not fit" in said
    assert f"folder from {tmp_path}" in said
    assert data.fingerprint in said
