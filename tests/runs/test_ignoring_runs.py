"""Runs on masks with pixels that don't count."""

import json
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
import pytest
from small_data import encoded, picture, write_files

from jaxunet import evaluate
from jaxunet.config import IGNORED, Config, DataConfig, ModelConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import RunError
from jaxunet.learning.metrics import scores
from jaxunet.runs import calibration
from jaxunet.runs.loading import load
from jaxunet.runs.scoring import evaluate_split
from jaxunet.runs.training import train

SIDE = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Nine pairs to train on, an odd number, and five to validate; 128 or 200 is ignored."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in {"train": 9, "validation": 5}.items():
        images, masks = {}, {}
        for n in range(count):
            images[f"{n}.png"] = encoded(picture(10 * count + n, SIDE, SIDE))
            masks[f"{n}.png"] = rng.choice([0, 128, 255], (SIDE, SIDE)).astype(np.uint8)
        for value in (128, 200):
            written = {k: encoded(np.where(m == 128, value, m)) for k, m in masks.items()}
            write_files(root / str(value) / split / "images", images)
            write_files(root / str(value) / split / "masks", written)
    return Config(
        data=DataConfig(
            name="folder",
            dir=root / "128",
            prepared_dir=root / "prepared",
            image_size=SIDE,
            stored_size=SIDE,
            ignore_value=128,
        ),
        model=ModelConfig(width=2, depth=2),
        train=TrainConfig(epochs=1, batch_size=8, eval_batch_size=8, loss="bce_dice"),
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    train(config, prepare(config.data, progress=False), out, show_progress=False)
    return out


def test_weights_are_the_same_bit_for_bit_whatever_stands_where_nothing_counts(
    config, run, tmp_path
):
    assert config.data.dir is not None
    other = replace(config.data, dir=config.data.dir.with_name("200"), ignore_value=200)
    data = prepare(other, progress=False)
    changed = replace(config, data=other)
    found = train(changed, data, tmp_path / "other", show_progress=False).state
    jax.tree.map(np.testing.assert_array_equal, found.params, load(run).variables["params"])
    with pytest.raises(RunError, match=r"data\.ignore_value: 128 -> 200"):
        train(changed, data, run, resume=True, show_progress=False)


def test_a_pixel_that_counts_is_learnt_from(config, run, tmp_path):
    assert config.data.dir is not None
    other = replace(
        config.data, dir=config.data.dir.with_name("200"), ignore_value=None, binarize=True
    )
    data = prepare(other, progress=False)  # greys, of which those of 200 are lesion
    found = train(replace(config, data=other), data, tmp_path / "other", show_progress=False)
    ours = jax.tree.leaves(load(run).variables["params"])
    theirs = jax.tree.leaves(found.state.params)
    assert max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) > 1e-4


def test_every_score_of_a_run_is_of_the_pixels_that_count(config, run):
    data = prepare(config.data, progress=False)
    model, strategy = load(run), make_strategy("jit", jax.devices()[:1])
    truths = np.stack([e["mask"][..., 0] for e in data.source("validation")])
    counted = (truths != IGNORED).sum((1, 2))
    seen = []
    for clean in (False, True):
        found = evaluate_split(
            *(model, strategy, data, "validation", config.data),
            clean=clean,
            look=seen.append,
            show_progress=False,
        )
        assert found.counts.sum(axis=1).tolist() == counted.tolist()
        if not clean:  # as the run itself scored it
            said = json.loads((run / "summary.json").read_text())
            for protocol, expected in scores(found.counts).items():
                assert said["scores"][protocol] == pytest.approx(expected)
            assert said["loss"] == pytest.approx(found.loss)
        lesion = found.counts[:, [0, 2]].sum(axis=1)
        assert lesion.tolist() == (truths == 255).sum((1, 2)).tolist()
        assert found.bins[..., 0].sum(axis=1).tolist() == counted.tolist()
        assert found.bins[..., 2].sum(axis=1).tolist() == lesion.tolist()
    maps = seen[0]  # one batch holds the split
    losses = []
    for z, mask in zip(maps["logits"].astype(np.float64), truths, strict=True):
        z, y = z[mask != IGNORED], mask[mask != IGNORED] == 255
        p = 1 / (1 + np.exp(-z))
        dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        losses.append((np.logaddexp(0, z) - y * z).mean() + dice)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    with mock.patch.object(calibration, "evaluate_split", wraps=evaluate_split) as scored:
        tables = []
        with mock.patch.object(
            calibration.calibration,
            "count_thresholds",
            side_effect=lambda *each: tables.append(each) or real_table(*each),
        ):
            calibration.calibrate(model, strategy, show_progress=False)
    assert scored.call_count == 1
    assert sum(int(counted.sum()) for _, _, counted in tables) == counted.sum()


real_table = calibration.calibration.count_thresholds


def test_other_data_that_ignore_none_are_scored_whole(config, run, tmp_path):
    assert config.data.dir is not None
    root = tmp_path / "whole"
    images = {f"{n}.png": encoded(picture(n, SIDE, SIDE)) for n in range(3)}
    lesion = np.random.default_rng(1).choice([0, 255], (SIDE, SIDE)).astype(np.uint8)
    write_files(root / "test" / "images", images)
    write_files(root / "test" / "masks", dict.fromkeys(images, encoded(lesion)))
    whole = replace(config.data, dir=root, ignore_value=None)
    found = evaluate(run, "test", data=whole, show_progress=False)
    assert sum(b["pixels"] for b in found["calibration"]["bins"]) == 3 * SIDE * SIDE
