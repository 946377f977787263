import json
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.devices import compiling
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import ConfigError, RunError, Stopped
from jaxunet.learning.steps import eval_step
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.clock import ROWS
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.evaluation import evaluate
from jaxunet.runs.loading import load
from jaxunet.runs.record import load_config, read_metrics
from jaxunet.runs.training import Trainer, train

EPOCHS, STEPS_PER_EPOCH = 2, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """20 training images in batches of 8: the last batch of an epoch is padded."""
    return Config(
        data=DataConfig(
            image_size=16,
            prepared_dir=tmp_path_factory.mktemp("prepared"),
            synthetic_train=20,
            synthetic_validation=9,
        ),
        model=ModelConfig(width=4, depth=2, init="he", norm="batch"),
        optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=0.9),
        train=TrainConfig(
            epochs=EPOCHS, batch_size=8, eval_batch_size=8, log_every=1, checkpoint_every=2
        ),
    )


@pytest.fixture(scope="module")
def data(config):
    return prepare(config.data, progress=False)


@pytest.fixture(scope="module")
def unbroken(config, data, tmp_path_factory):
    """Runs that were left alone, by strategy."""
    runs = {}
    for parallel in ("pmap", "jit"):
        out = tmp_path_factory.mktemp("unbroken") / parallel
        runs[parallel] = out, train(config, data, out, parallel=parallel, show_progress=False)
    return runs


def lines(run: Path) -> list[dict]:
    """What metrics.jsonl says, without the time and the memory it took."""
    return [
        {k: v for k, v in line.items() if k not in ("wall_seconds", "measured")}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def assert_same_state(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


class StopAfter:
    """Batches that ask the process to stop while giving out number `count`."""

    def __init__(self, batches, count):
        self.batches, self.left = batches, count

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def train_until(steps, config, data, out, parallel="pmap"):
    with RunDirectory(out, config, resume=True) as run:
        trainer = Trainer(config, data, run, parallel=parallel, show_progress=False)
        trainer.batches = StopAfter(trainer.batches, steps)
        with pytest.raises(Stopped, match=f"after step {steps} of 6.*--resume"):
            trainer.train()


@pytest.mark.parametrize(
    ("steps", "parallel"),
    [(1, "pmap"), (2, "jit"), (3, "pmap"), (3, "jit"), (5, "pmap"), (6, "jit")],
)
def test_a_run_stopped_anywhere_and_resumed_ends_bit_identical(
    steps, parallel, config, data, unbroken, tmp_path
):
    expected_run, expected = unbroken[parallel]
    train_until(steps, config, data, tmp_path / "run", parallel)
    assert not (tmp_path / "run" / "summary.json").exists()
    found = train(
        config, data, tmp_path / "run", resume=True, parallel=parallel, show_progress=False
    )
    assert int(found.state.step) == 6
    assert_same_state(found.state, expected.state)
    assert lines(tmp_path / "run") == lines(expected_run)
    assert found.summary["scores"] == expected.summary["scores"]


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
@pytest.mark.parametrize("cache", ["host", "device"])
def test_a_cached_run_is_bit_identical_and_resumes(
    cache, parallel, config, data, unbroken, tmp_path, monkeypatch
):
    expected_run, expected = unbroken[parallel]
    # Half of them with both steps compiled before they are called, as on a GPU.
    monkeypatch.setattr(compiling, "pays", lambda: cache == "device")
    cached = replace(config, data=replace(config.data, cache=cache))
    train_until(4, cached, data, tmp_path / "run", parallel)
    found = train(
        cached, data, tmp_path / "run", resume=True, parallel=parallel, show_progress=False
    )
    assert_same_state(found.state, expected.state)
    assert lines(tmp_path / "run") == lines(expected_run)
    assert found.summary["scores"] == expected.summary["scores"]


def test_a_run_with_worker_processes_resumes_bit_identical(config, data, unbroken, tmp_path):
    config = replace(config, data=replace(config.data, workers=2))
    train_until(2, config, data, tmp_path / "run")
    found = train(config, data, tmp_path / "run", resume=True, show_progress=False)
    expected_run, expected = unbroken["pmap"]
    assert_same_state(found.state, expected.state)
    assert lines(tmp_path / "run") == lines(expected_run)


def test_a_stop_during_evaluation_is_saved_and_resumed(
    config, data, unbroken, tmp_path, monkeypatch
):
    import jaxunet.runs.training as training

    real = training.evaluate

    def stopping(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "evaluate", stopping)
    with pytest.raises(Stopped, match="SIGINT after step 3"):
        train(config, data, tmp_path / "run", show_progress=False)
    monkeypatch.undo()
    found = train(config, data, tmp_path / "run", resume=True, show_progress=False)
    assert_same_state(found.state, unbroken["pmap"][1].state)
    assert lines(tmp_path / "run") == lines(unbroken["pmap"][0])


class Slow:
    """Batches that come late, for which the devices wait."""

    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        time.sleep(0.1)
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def test_the_rows_of_the_time_are_the_wall_time_across_kills(
    config, data, tmp_path, monkeypatch
):
    """Two processes die while the second epoch is scored, of which nothing is saved."""
    import jaxunet.runs.training as training

    real, wall, died = training.evaluate, 0.0, 0.0

    def evaluate_once(*args, **kwargs):
        nonlocal died
        if read_metrics(out / "metrics.jsonl")[-1]["step"] == 6:
            died = time.monotonic()
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    out, lost = tmp_path / "run", 0.0
    config = replace(config, train=replace(config.train, checkpoint_every=0))
    for _ in range(2):
        began, at = time.monotonic(), time.time()
        with RunDirectory(out, config, resume=True) as run, monkeypatch.context() as patch:
            patch.setattr(training, "evaluate", evaluate_once)
            trainer = Trainer(config, data, run, show_progress=False, started=began)
            trainer.batches = Slow(trainer.batches)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        # To its last line: what came after that nobody knows.
        wall, began_last = wall + (out / "metrics.jsonl").stat().st_mtime - at, began
        logged = read_metrics(out / "metrics.jsonl")
        lost += logged[-1]["wall_seconds"] - trainer.position.seconds
    at = time.time()
    summary = train(config, data, out, resume=True, show_progress=False).summary
    wall += (out / "summary.json").stat().st_mtime - at

    spent, total = summary["time"]["seconds"], summary["time"]["total_seconds"]
    assert sum(spent.values()) == pytest.approx(total, abs=0.01)
    assert total == pytest.approx(wall, rel=0.02, abs=0.1)  # to write files takes some, too
    assert set(spent) == set(ROWS) - {"undivided"}
    assert lost > 2 * 3 * 0.1  # by the log; with the start of the second, that saved nothing
    assert lost < spent["lost"] < lost + died - began_last
    assert spent["data"] > 2 * 0.1  # of the first epoch: that is saved
    seconds = [line["wall_seconds"] for line in read_metrics(out / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert summary["wall_seconds"] > seconds[-1]
    assert summary["wall_seconds"] < total - lost - spent["start"] + 0.01


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_scores_are_those_of_the_averaged_weights(parallel, config, data, unbroken):
    out, outcome = unbroken[parallel]
    state, strategy = outcome.state, make_strategy(parallel)
    model = load(out)
    assert_same_state(model.variables, state.variables)
    feed = Feed(strategy, data.source("validation"), config.data, progress=False)
    compiled = feed.compile(partial(eval_step, model.recipe), outputs="replicated")

    def loss(variables):
        placed = strategy.replicate(variables)
        return evaluate(feed, compiled, placed, config, progress=False).loss

    assert loss(state.variables) == pytest.approx(outcome.summary["loss"], rel=1e-6)
    raw = {**state.variables, "params": state.params}
    assert loss(raw) != pytest.approx(outcome.summary["loss"], rel=1e-4)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_what_was_fetched_stays_as_it_was_when_the_device_goes_on(parallel):
    """A step that is given its memory away writes the next state where the last one was."""
    strategy = make_strategy(parallel)
    step = strategy.compile(lambda x, _: x + 1, outputs="replicated", donate=True)
    placed = strategy.replicate(np.zeros(4096, np.float32))
    batch = strategy.split(np.zeros(8, np.uint8))
    placed = step(placed, batch)
    fetched = strategy.fetch(placed)
    shard = np.asarray(placed.addressable_shards[0].data)
    assert not np.shares_memory(fetched, shard)
    del shard
    for _ in range(3):
        placed = step(placed, batch)
    np.testing.assert_array_equal(fetched, 1)


def test_a_finished_run_can_be_extended_and_equals_a_longer_one(config, data, tmp_path):
    longer = replace(config, train=replace(config.train, epochs=3))
    expected = train(longer, data, tmp_path / "long", show_progress=False)
    train(config, data, tmp_path / "short", show_progress=False)
    found = train(longer, data, tmp_path / "short", resume=True, show_progress=False)
    assert_same_state(found.state, expected.state)
    assert lines(tmp_path / "short") == lines(tmp_path / "long")
    with pytest.raises(RunError, match="9 steps"):
        train(config, data, tmp_path / "short", resume=True, show_progress=False)


def test_the_run_directory_holds_what_the_contract_says(config, data, tmp_path, figures):
    out = tmp_path / "run"
    outcome = train(config, data, out, show_progress=False)
    for name in ("config.json", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json"):
        assert (out / name).exists()
    assert {p.name for p in (out / "figures").iterdir()} == {"curves.png", "predictions.png"}
    assert load_config(out) == config
    record = json.loads((out / "config.json").read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert record["devices"]["count"] == 8
    assert record["dataset"]["count"] == 20
    summary = json.loads((out / "summary.json").read_text())
    assert summary == outcome.summary
    assert (
        summary["dataset"].items()
        >= {
            "name": "synthetic",
            "split": "validation",
            "count": 9,
            "official_count": None,
            "image_size": 16,
        }.items()
    )
    assert set(summary["scores"]) == {"per_image", "batch_of_4", "pooled"}
    assert summary["step"] == 6
    assert summary["epoch"] == 2
    splits = [(line["step"], line["split"]) for line in lines(out)]
    assert splits.count((3, "validation")) == splits.count((6, "validation")) == 1
    assert [step for step, split in splits if split == "train"] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_checkpoints_keep_the_latest_two_and_the_best(config, data, unbroken):
    out, outcome = unbroken["pmap"]
    checkpoints = Checkpoints(out / "checkpoints", "dice")
    dice = {
        line["step"]: line["values"]["dice"]
        for line in lines(out)
        if line["split"] == "validation"
    }
    best = max(dice, key=dice.get)
    assert checkpoints.steps() == sorted({4, 6, best})
    assert checkpoints.step_of("latest") == 6
    assert checkpoints.step_of("best") == outcome.summary["best"]["step"] == best
    checkpoints.close()


def test_a_configuration_that_does_not_fit_is_refused_by_field(config, data, unbroken):
    out, _ = unbroken["pmap"]
    other = replace(
        config,
        model=replace(config.model, width=8),
        train=replace(config.train, seed=5, epochs=9),
    )
    with pytest.raises(RunError, match=r"model.width: 4 -> 8; train.seed: 0 -> 5\."):
        train(other, data, out, resume=True, show_progress=False)


def test_a_run_of_before_goes_on_with_the_evaluation_batch_of_today(config, unbroken):
    """Presets name none any more, and those recorded are 4 or more."""
    out, _ = unbroken["pmap"]
    today = replace(config, train=replace(config.train, eval_batch_size=None))
    RunDirectory(out, today, resume=True).close()
    assert load_config(out).train.eval_batch_size == 8


def test_a_run_directory_is_never_overwritten_in_silence(config, data, unbroken, tmp_path):
    out, _ = unbroken["pmap"]
    before = (out / "summary.json").read_bytes()
    with pytest.raises(RunError, match=r"complete run.*--resume"):
        train(config, data, out, show_progress=False)
    assert (out / "summary.json").read_bytes() == before

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    with pytest.raises(RunError, match="not empty and holds no run"):
        train(config, data, tmp_path / "thesis", resume=True, show_progress=False)


def test_a_directory_in_use_is_refused(config, tmp_path):
    with (
        RunDirectory(tmp_path, config, resume=False),
        pytest.raises(RunError, match="in use by another run"),
    ):
        RunDirectory(tmp_path, config, resume=True)


def test_a_non_finite_loss_stops_the_run_and_names_the_last_good_checkpoint(
    config, data, tmp_path
):
    wild = replace(config, optimizer=OptimizerConfig(name="sgd", learning_rate=1e30))
    with pytest.raises(RunError, match=r"not finite at step [23] .*Last good checkpoint"):
        train(wild, data, tmp_path / "run", show_progress=False)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", "dice")
    assert all(step < 2 for step in checkpoints.steps())
    checkpoints.close()


def test_an_edited_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"train": {"epochs": "many"}}}')
    with pytest.raises(ConfigError, match=r"config.json.*train.epochs is 'many'"):
        load_config(tmp_path)
