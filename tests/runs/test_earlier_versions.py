"""Runs of earlier versions are scored and predict as they did there, and go on.

`make.py` makes an archive of them for each release.
"""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxunet
from jaxunet.data import prepare
from jaxunet.inference import model
from jaxunet.runs.evaluation import describe_split
from jaxunet.runs.record import load_config, other_data, read_metrics
from jaxunet.runs.scoring import evaluate_split

ARCHIVES = sorted(Path(__file__).parent.glob("v*.tar.*"))


def runs_of(archive: Path) -> list[str]:
    with tarfile.open(archive) as opened:
        return sorted({name.split("/")[0] for name in opened.getnames()})


CASES = [(archive, name) for archive in ARCHIVES for name in runs_of(archive)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def old(request, tmp_path_factory):
    """A run, its data, and what the version that made it made of it."""
    archive, name = request.param
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(archive) as opened:
        members = [each for each in opened.getmembers() if each.name.split("/")[0] == name]
        opened.extractall(folder, members, filter="data")
    run = folder / name
    data = replace(load_config(run).data, prepared_dir=folder / "prepared")
    return run, data, json.loads((run / "expected.json").read_text())


def test_it_is_scored_as_it_was(old, monkeypatch):
    run, data, expected = old
    prepared = prepare(data, progress=False)
    assert other_data(run, describe_split(prepared, "test", 16), data) is None
    found = []

    def noted(*args, **options):
        found.append(evaluate_split(*args, **options))
        return found[0]

    monkeypatch.setattr(model, "evaluate_split", noted)
    jaxunet.evaluate(run, "test", data=data, show_progress=False)
    np.testing.assert_allclose(found[0].counts, expected["test_counts"], atol=1)


def test_it_predicts_as_it_did(old):
    run, _, expected = old
    picture = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)[0]
    loaded, wanted = jaxunet.load(run), np.array(expected["probabilities"])
    np.testing.assert_allclose(loaded.probabilities(picture), wanted, atol=1e-5)
    sure = abs(wanted - loaded.config.train.threshold) > 1e-5
    mask = np.where(wanted > loaded.config.train.threshold, 255, 0)
    np.testing.assert_array_equal(loaded.predict(picture)[sure], mask[sure])


def test_it_goes_on(old):
    """Last, as it changes the run."""
    run, data, expected = old
    config = load_config(run)
    config = replace(config, data=data, train=replace(config.train, epochs=3))
    prepared = prepare(data, progress=False)
    outcome = jaxunet.train(config, prepared, run, resume=True, show_progress=False)
    assert int(outcome.state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.state.params))
    found = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] == 3]
    assert [line["split"] for line in found] == [x["split"] for x in expected["third_epoch"]]
    # One step on from the same weights; how they are averaged is this version's own.
    for line, before in zip(found, expected["third_epoch"], strict=True):
        if line["split"] == "train":
            known = before["values"].keys()  # a later version may log more
            assert {name: line["values"][name] for name in known} == pytest.approx(
                before["values"], rel=1e-3
            )
    assert json.loads((run / "config.json").read_text())["dataset"]["counts"]["train"] == 8
