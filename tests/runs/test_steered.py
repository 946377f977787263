"""Runs that start from other weights, end by themselves, or compute a batch in parts."""

import json
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import torch

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.config_json import to_dict
from jaxunet.data import Prepared, prepare
from jaxunet.errors import ConfigError, DataError, RunError, Stopped
from jaxunet.interop.pytorch_unet import make_pytorch_unet
from jaxunet.interop.starting import weights_to_start_from
from jaxunet.runs.evaluation import Evaluation
from jaxunet.runs.loading import load
from jaxunet.runs.starting import Given, say_what_both_splits_hold, with_fitting
from jaxunet.runs.training import Trainer, train


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        data=DataConfig(
            image_size=16,
            synthetic_train=16,
            synthetic_validation=4,
            prepared_dir=tmp_path_factory.mktemp("prepared"),
        ),
        model=ModelConfig(width=2, depth=2),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-9),  # weights stay in sight
        train=TrainConfig(epochs=1, batch_size=16, eval_batch_size=8),
    )


@pytest.fixture(scope="module")
def data(config: Config) -> Prepared:
    return prepare(config.data, progress=False)


@pytest.fixture(scope="module")
def first(config: Config, data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"
    train(replace(config, train=replace(config.train, seed=5)), data, run, show_progress=False)
    return run


def record(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["init_from"]


def test_a_run_starts_from_anothers_weights_and_says_so(config, data, first, tmp_path, capfd):
    wanted = load(first).variables["params"]
    given = weights_to_start_from(first)
    found = train(config, data, tmp_path / "same", init_from=given).state.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found, wanted)
    said = record(tmp_path / "same")
    assert (said["taken"], said["as_drawn"], said["left_over"]) == (16, [], [])
    assert said["source"] == str(first)
    assert f"From {first}: 16 tensors taken" in capfd.readouterr().out

    # Two classes: the head alone is another. Resumed without the weights' being there.
    two = replace(config, model=replace(config.model, num_logits=2))
    run = tmp_path / "two"
    found = train(two, data, run, init_from=given, show_progress=False).state.params
    for part in ("encoder", "decoder"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found[part], wanted[part]
        )
    heads = ["params/head/bias (other shape)", "params/head/kernel (other shape)"]
    assert record(run)["as_drawn"] == heads
    longer = replace(two, train=replace(two.train, epochs=2))
    train(longer, data, run, resume=True, show_progress=False)
    assert record(run)["as_drawn"] == heads

    other = Given(
        {"params": {"head": {"kernel": np.ones((3, 1))}}}, "another", "", config.model
    )
    with pytest.raises(DataError, match=r"Nothing of another fits this model"):
        train(config, data, tmp_path / "other", init_from=other, show_progress=False)


def test_what_would_fit_and_be_wrong_is_not_taken(config, data, first, tmp_path):
    given = weights_to_start_from(first)
    turned = replace(config, model=replace(config.model, concat="skip_first"))
    with pytest.raises(ConfigError, match=r"--model\.concat upsampled_first"):
        train(turned, data, tmp_path / "turned", init_from=given, show_progress=False)
    normed = replace(given, config=replace(given.config, norm="batch"))
    start = {"params": {"a": {"norm_0": {"scale": np.ones(2)}, "b": np.ones(1)}}}
    _, said = with_fitting(start, replace(normed, variables=start), config.model)
    assert (said["taken"], said["as_drawn"]) == (1, ["params/a/norm_0/scale"])


def test_a_run_without_a_checkpoint_starts_from_the_same_weights_or_not_at_all(
    config, data, first, tmp_path, monkeypatch
):
    given, run = weights_to_start_from(first), tmp_path / "run"
    with monkeypatch.context() as patch:  # killed before its first checkpoint
        patch.setattr(Trainer, "_train", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, data, run, init_from=given, show_progress=False)
    with pytest.raises(
        RunError, match=r"was to start from .*first.*give --init-from that again"
    ):
        train(config, data, run, resume=True, show_progress=False)
    other = replace(given, sha256="0" * 64)
    with pytest.raises(RunError, match=r"was to start from .*first \(SHA-256"):
        train(config, data, run, resume=True, init_from=other, show_progress=False)
    train(config, data, run, resume=True, init_from=given, show_progress=False)
    assert record(run)["sha256"] == given.sha256
    card = (run / "MODEL_CARD.md").read_text()
    assert f"Start: fine-tuned from {first} (SHA-256 {given.sha256}; pictures drawn" in card
    assert 'license: "other"' in card


def test_pytorchs_weights_of_other_channels_are_taken_as_far_as_they_fit(tmp_path: Path):
    state = make_pytorch_unet(ModelConfig(width=2, depth=2)).state_dict()
    state["downConv1.0.weight"] = torch.ones(2, 1, 3, 3)  # grey pictures
    state["out.weight"], state["out.bias"] = torch.ones(5, 2, 1, 1), torch.ones(5)
    torch.save(state, tmp_path / "grey.pth")
    given = weights_to_start_from(tmp_path / "grey.pth")
    assert set(given.unusable) == {"downConv1.0.weight", "out.weight", "out.bias"}
    kernel = given.variables["params"]["encoder"]["level_1"]["conv_0"]["kernel"]
    np.testing.assert_array_equal(
        kernel, state["downConv2.0.weight"].numpy().transpose(2, 3, 1, 0)
    )
    assert "kernel" not in given.variables["params"]["encoder"]["level_0"]["conv_0"]
    torch.save({"a": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(DataError, match=r"--init-from .*odd\.pth can't be used"):
        weights_to_start_from(tmp_path / "odd.pth")


def test_patience_ends_a_run_and_counts_across_resumes(config, data, tmp_path, monkeypatch):
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.6, 0.9, 0.9, 0.9])

    def evaluated(*_args: object, **_options: object) -> Evaluation:
        hits = round(100 * next(scores))  # which is the Dice in percent, with as many misses:
        counts = np.tile([hits, 100 - hits, 100 - hits, 56 + hits], (4, 1))
        return Evaluation(counts=counts, loss=0.5, seconds=0.1)

    monkeypatch.setattr("jaxunet.runs.training.evaluate", evaluated)
    patient = replace(config, train=replace(config.train, epochs=8, patience=3))
    until = replace(patient, train=replace(patient.train, epochs=4))
    train(until, data, tmp_path / "run", show_progress=False)
    outcome = train(patient, data, tmp_path / "run", resume=True, show_progress=False)
    assert (outcome.summary["epoch"], outcome.summary["step"]) == (5, 5)


def test_a_time_limit_saves_and_is_no_failure(config, data, tmp_path):
    longer = replace(config, train=replace(config.train, epochs=3))
    with pytest.raises(Stopped, match=r"by its time limit after step 1 of 3.*--resume") as said:
        train(longer, data, tmp_path / "run", show_progress=False, deadline=time.monotonic())
    assert said.value.signal is None
    outcome = train(longer, data, tmp_path / "run", resume=True, show_progress=False)
    whole = train(longer, data, tmp_path / "whole", show_progress=False)
    jax.tree.map(np.testing.assert_array_equal, outcome.state, whole.state)


def test_a_batch_in_parts_is_the_batch(config, data, tmp_path):
    fast = replace(config, optimizer=OptimizerConfig(name="sgd", learning_rate=0.1))
    states = []
    for part in (None, 8):
        parts = replace(fast, train=replace(fast.train, microbatch=part))
        run = tmp_path / str(part)
        states.append(train(parts, data, run, show_progress=False).state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)
    with pytest.raises(ConfigError, match=r"train\.microbatch is 3.*a divisor"):
        TrainConfig(batch_size=8, microbatch=3)


def test_a_runs_record_is_a_preset(config, first, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    from command_line import preset, take_preset

    name, rest = take_preset([str(first / "config.json"), "--train.epochs", "2"])
    assert rest == ["--train.epochs", "2"]
    assert preset(name).train.seed == 5
    record = json.loads((first / "config.json").read_text())
    record["config"]["optimizer"] |= {"extend": "hold", "extended_at": [3]}
    (tmp_path / "longer.json").write_text(json.dumps(record))
    assert preset(str(tmp_path / "longer.json")).optimizer.extended_at == ()
    assert take_preset(["--preset", str(first)]) == (str(first), [])
    assert take_preset(["--preset=own"]) == ("own", [])
    copied = tmp_path / "mine.json"
    copied.write_text(json.dumps({"config": to_dict(config)}))
    assert to_dict(preset(str(copied))) == to_dict(config)


def test_validating_on_what_is_trained_on_is_said(data: Prepared, capsys):
    say_what_both_splits_hold(data, DataConfig())
    assert not capsys.readouterr().err
    say_what_both_splits_hold(data, DataConfig(validation_split="train[-3:]+validation"))
    assert "warning: 3 pictures of data.validation_split 'train[-3:]" in capsys.readouterr().err
