"""Runs whose schedule, average or accumulation once went wrong without a word."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_data import encoded, picture

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.errors import ConfigError, RunError
from jaxunet.learning.optim import make_schedule
from jaxunet.runs import training
from jaxunet.runs.evaluation import Evaluation, report
from jaxunet.runs.record import load_config, read_metrics
from jaxunet.runs.training import train


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """20 images in steps of 2 x 8: two steps an epoch, the second one padded."""
    return Config(
        data=DataConfig(
            image_size=16,
            prepared_dir=tmp_path_factory.mktemp("data"),
            synthetic_train=20,
            synthetic_validation=8,
        ),
        model=ModelConfig(width=2, depth=2, init="he"),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, schedule="cosine", warmup_fraction=0.25, accumulate_steps=2
        ),
        train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8, log_every=1),
    )


def rates(run):
    values = [line["values"] for line in read_metrics(run / "metrics.jsonl")]
    return [v["learning_rate"] for v in values if "learning_rate" in v]


def test_a_cosine_run_with_accumulation_goes_on_as_it_is_told(config, tmp_path):
    data, out = prepare(config.data, progress=False), tmp_path / "run"
    first = train(config, data, out, show_progress=False)
    assert int(first.state.step) == 4
    schedule = make_schedule(config.optimizer, 4)
    assert rates(out) == pytest.approx([float(schedule(n)) for n in range(4)])
    longer = replace(config, train=replace(config.train, epochs=3))
    with pytest.raises(ConfigError, match=r"learning rate would jump .*--optimizer\.extend"):
        train(longer, data, out, resume=True, show_progress=False)
    assert load_config(out) == config  # nothing was touched
    held = replace(longer, optimizer=replace(longer.optimizer, extend="hold"))
    assert int(train(held, data, out, resume=True, show_progress=False).state.step) == 6
    assert rates(out)[4:] == pytest.approx([float(schedule(3))] * 2)
    assert load_config(out).optimizer.extended_at == (4,)
    # Once said it is recorded, and a resume needs no word of it.
    assert int(train(longer, data, out, resume=True, show_progress=False).state.step) == 6


def test_more_parts_than_an_epoch_has_images_still_train(config, tmp_path):
    config = replace(config, optimizer=OptimizerConfig(learning_rate=0.1, accumulate_steps=50))
    data = prepare(config.data, progress=False)
    outcome = train(config, data, tmp_path / "run", show_progress=False)
    assert int(outcome.state.step) == config.train.epochs
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [line["values"]["loss"] for line in lines if "grad_norm" in line["values"]]
    assert losses[1] < losses[0]


def test_a_gradient_that_is_not_finite_stops_a_run_whose_loss_is(config, tmp_path, monkeypatch):
    real = training.train_step

    def broken(recipe, state, batch):
        state, metrics = real(recipe, state, batch)
        return state, {**metrics, "grad_norm": jnp.where(state.step == 2, jnp.inf, 1.0)}

    monkeypatch.setattr(training, "train_step", broken)
    data = prepare(config.data, progress=False)
    with pytest.raises(RunError, match=r"not finite at step 2 \(loss \d.*gradient norm inf"):
        train(config, data, tmp_path / "run", show_progress=False)


@pytest.mark.parametrize("name", ["own", "demo"])
def test_a_preset_trains_on_twelve_pictures(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    preset = importlib.import_module("presets").PRESETS[name]()
    for i in range(12):
        mask = np.zeros((30, 40), np.uint8)
        mask[5 : 15 + i, 10:30] = 255
        for folder, array in (("images", picture(i)), ("masks", mask)):
            path = tmp_path / "pictures" / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(array))
    config = replace(  # smaller and shorter, but with the preset's own optimizer
        preset,
        data=DataConfig("folder", tmp_path / "pictures", tmp_path / "prepared", image_size=16),
        model=replace(preset.model, width=2, depth=2),
        train=replace(preset.train, epochs=1, batch_size=8, eval_batch_size=8),
    )
    data = prepare(config.data, progress=False)
    outcome = train(config, data, tmp_path / "run", show_progress=False)
    assert np.isfinite(outcome.summary["loss"])


def test_a_loss_that_was_not_computed_is_left_out_and_one_that_is_not_finite_is_an_error():
    counts = np.array([[1, 2, 3, 4]])
    dataset = {"name": "mine", "split": "test"}
    record = report(Evaluation(counts, None, 1.0), dataset=dataset, step=7, epoch=1)
    assert "loss" not in record
    json.dumps(record, allow_nan=False)
    for loss in (np.nan, np.inf):
        with pytest.raises(RunError, match=rf"step 7 on mine test is {loss}"):
            report(Evaluation(counts, loss, 1.0), dataset=dataset, step=7, epoch=1)
