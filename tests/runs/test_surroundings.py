"""What a run is started from and in: threads, notebooks, JAX's own switches, signals."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from bad_input.ground import run as run_script
from scripts import environment

from jaxunet.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxunet.config_json import to_dict
from jaxunet.data import prepare
from jaxunet.runs.loading import load
from jaxunet.runs.record import read_metrics
from jaxunet.runs.training import train

PROGRAM = """
import json, sys
from pathlib import Path
from jaxunet.config import Config
from jaxunet.config_json import from_dict
from jaxunet.data import prepare
from jaxunet.devices.startup import start
from jaxunet.runs import training

if __name__ == "__main__":
    start()
    config = from_dict(Config, json.loads(sys.argv[1]))
    training.write_figures = lambda *_args, **_options: []
    {change}
    data = prepare(config.data, progress=False)
    training.train(config, data, Path(sys.argv[2]))
"""

FAILING = """
    compiled = training.Feed.compile
    def compile(feed, step, **options):
        function, calls = compiled(feed, step, **options), []
        def fail(*args):
            calls.append(args)
            if len(calls) == 3:
                raise MemoryError("in the third step")
            return function(*args)
        return fail if options.get("donate") else function
    training.Feed.compile = compile
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """One step of eight pictures."""
    return Config(
        data=DataConfig(
            image_size=16,
            stored_size=16,
            prepared_dir=tmp_path_factory.mktemp("prepared"),
            synthetic_train=8,
            synthetic_validation=8,
        ),
        model=ModelConfig(width=2, depth=2),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-2),
        train=TrainConfig(
            epochs=1, batch_size=8, eval_batch_size=8, log_every=1, augment="none"
        ),
    )


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    """What the run gives where nothing is out of the ordinary."""
    data = prepare(config.data, progress=False)
    return train(config, data, tmp_path_factory.mktemp("plain") / "run", show_progress=False)


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def in_a_notebook(function):
    async def cell():
        return function()

    return asyncio.run(cell())


@pytest.mark.parametrize("start", [in_a_thread, in_a_notebook])
def test_a_run_is_the_same_in_a_thread_and_in_a_running_event_loop(
    start, config, plain, tmp_path
):
    data = prepare(config.data, progress=False)
    found = start(lambda: train(config, data, tmp_path / "run", show_progress=False))
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(plain.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert load(tmp_path / "run").step == 1


def in_a_process(config: Config, out: Path, change: str = "", more: str = "", **variables: str):
    """`PROGRAM` on one device; stderr None for one that is closed."""
    program = out.parent / "program.py"
    program.write_text(PROGRAM.replace("{change}", change.strip()))
    words = [sys.executable, str(program), json.dumps(to_dict(config), default=str), str(out)]
    kept = {**environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {more}', "sh", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, **variables},
    )


def test_a_run_without_compilation_is_the_compiled_one(config, plain, tmp_path):
    done = in_a_process(config, tmp_path / "run", JAX_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss"] == pytest.approx(plain.summary["loss"], rel=1e-5)
    assert summary["scores"] == plain.summary["scores"]


def test_a_run_with_64_bits_and_a_watch_for_nans_trains_and_evaluates_with_stderr_closed(
    config, tmp_path
):
    switches = {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1"}
    done = in_a_process(config, tmp_path / "run", more="2>&-", **switches)
    assert done.returncode == 0, done.stdout
    assert "epoch 1/1  step 1  train loss" in done.stdout
    with jax.enable_x64(True), jax.debug_nans(True):
        status, output = run_script(["evaluate.py", tmp_path / "run"])
    assert status == 0, output
    found = json.loads((tmp_path / "run" / "evaluation-validation.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["scores"] == summary["scores"]
    assert found["loss"] == pytest.approx(summary["loss"], rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_that_fails_ends_the_process_with_its_traceback(config, workers, tmp_path):
    many = replace(
        config,
        data=replace(config.data, workers=workers),
        train=replace(config.train, batch_size=1, epochs=100, checkpoint_every=1),
    )
    start = time.monotonic()
    done = in_a_process(many, tmp_path / "run", FAILING)
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("MemoryError: in the third step"), done.stderr
    assert load(tmp_path / "run").step == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_and_a_schedulers_warning_save_and_have_their_own_status(
    number, config, tmp_path
):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("these tests were started by nohup, whose processes leave it ignored")
    log = tmp_path / "run" / "metrics.jsonl"

    def send():
        deadline = time.monotonic() + 100
        while not (log.exists() and read_metrics(log)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if log.exists():
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    status, output = run_script(
        [
            *("train.py", "--out", tmp_path / "run", "--train.epochs", 100_000),
            *("--data.image-size", 16, "--data.stored-size", 16, "--data.synthetic-train", 8),
            *("--data.synthetic-validation", 8, "--model.width", 2, "--model.depth", 2),
            *("--data.prepared-dir", config.data.prepared_dir, "--train.log-every", 1),
            *("--train.batch-size", 8, "--train.eval-batch-size", 8),
        ]
    )
    sender.join()
    assert status == 128 + number, output
    assert f"Stopped by {number.name} after step" in output
    assert f"after step {load(tmp_path / 'run').step} of" in output
