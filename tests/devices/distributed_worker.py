"""One process of several for `test_distributed.py`: does the jobs that stdin names, in order.

Each line is a JSON object; the answer goes to the file `<answer>.<process>`.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunet.config import Config
from jaxunet.config_json import from_dict
from jaxunet.data import Prepared, prepare
from jaxunet.devices import distributed
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import Pmap, ShardMap, make_strategy
from jaxunet.errors import DataError, JaxUNetError
from jaxunet.files import write_json
from jaxunet.learning.steps import eval_step
from jaxunet.runs import training
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.evaluation import evaluate
from jaxunet.runs.loading import load
from jaxunet.runs.starting import Given


class Recorded:
    """A source that remembers what was read from it."""

    def __init__(self, source: Any):
        self.source, self.read = source, []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.source[index]


class RecordedData:
    """A prepared dataset whose training split is `Recorded`."""

    def __init__(self, data: Prepared):
        self.data = data
        self.train = Recorded(data.source("train"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def source(self, split: str) -> Any:
        return self.train if split == "train" else self.data.source(split)


class Interrupted(Iterator):
    """Batches, before one of which something happens to one process."""

    def __init__(self, batches: Any, *, what: str, process: int, batch: int):
        self.batches, self.what, self.batch = batches, what, batch
        self.here = process == jax.process_index()

    def __next__(self) -> Any:
        if self.here and self.batches.get_state()["next_batch"] == self.batch:
            if self.what == "fail":
                raise DataError("a row that only this process reads is damaged")
            os.kill(os.getpid(), getattr(signal, self.what))
        return next(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def compile_once() -> None:
    """Jobs with one configuration and strategy share the compiled steps."""
    training.make_recipe = cache(training.make_recipe)
    compiled: dict[Any, Any] = {}

    def remembered(compile_: Any) -> Any:
        def wrapper(self: Any, step: Any, **options: Any) -> Any:
            static = (step.func, *step.args) if isinstance(step, partial) else (step,)
            key = (type(self), *map(id, static), *options.items())
            if key not in compiled:
                compiled[key] = static, compile_(self, step, **options)
            return compiled[key][1]

        return wrapper

    for strategy in (Pmap, ShardMap):
        strategy.compile = remembered(strategy.compile)


def train(job: dict[str, Any]) -> dict[str, Any]:
    config = from_dict(Config, job["config"])
    of_the_data, weights = config.data, None
    if "differs" in job and jax.process_index() == job["differs"]["process"]:
        differs = job["differs"]
        of_the_data = replace(config.data, **differs.get("data", {}))
        config = replace(config, train=replace(config.train, **differs.get("train", {})))
        if "weights" in differs:
            weights = Given({}, "other.pth", differs["weights"], config.model)
    data = RecordedData(prepare(of_the_data, progress=False))
    with RunDirectory(Path(job["out"]), config, resume=job["resume"]) as run:
        trainer = training.Trainer(
            config,
            data,
            run,
            parallel=job["parallel"],
            show_progress=False,
            init_from=weights,
        )
        if "interrupt" in job:
            trainer.batches = Interrupted(trainer.batches, **job["interrupt"])
        outcome = trainer.train()
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(outcome.state)]
    if distributed.is_main():
        np.savez(job["out"] + "/state.npz", *leaves)
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
    return {
        "digest": digest,
        "first_step": trainer.first_step,
        "scores": outcome.summary["scores"],
        "read": data.train.read,
    }


def score(job: dict[str, Any]) -> dict[str, Any]:
    model = load(Path(job["run"]))
    strategy = make_strategy(job["parallel"])
    source = prepare(model.config.data, progress=False).source("validation")
    feed = Feed(strategy, source, model.config.data, progress=False)
    found = evaluate(
        feed,
        feed.compile(partial(eval_step, model.recipe), outputs="replicated"),
        strategy.replicate(model.variables),
        model.config,
        progress=False,
    )
    return {"counts": found.counts.tolist(), "loss": found.loss}


def prepare_once(job: dict[str, Any]) -> dict[str, Any]:
    config = from_dict(Config, job["config"])
    assert config.data.prepared_dir is not None
    found: list[bool] = []

    def build() -> Prepared:
        found.append(config.data.prepared_dir.exists())
        return prepare(config.data, progress=False)

    data = distributed.main_first(build, "preparing the data")
    return {"found": found, "counts": data.counts}


def bits(job: dict[str, Any]) -> dict[str, Any]:
    """Send values whose bits a sum would change; every process has its own."""
    mine = np.array([-0.0, np.nan, jax.process_index()], np.float32)
    sent = distributed.from_main({"a": mine, "b": np.array(jax.process_index() + 3)})
    return {"a": sent["a"].tobytes().hex(), "b": int(sent["b"])}


JOBS = {"train": train, "score": score, "prepare": prepare_once, "bits": bits}


def main() -> None:
    if distributed.COUNT in os.environ:
        distributed.HEARTBEAT_TIMEOUT = int(sys.argv[1])
        distributed.initialize()
    compile_once()
    training.write_figures = lambda *_args, **_options: []  # test_experiments draws them
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = JOBS[job["do"]](job)
        except JaxUNetError as error:
            if not job.get("may_fail"):
                raise
            answer = {"error": [type(error).__name__, str(error)]}
        write_json(Path(f"{job['answer']}.{jax.process_index()}"), answer)
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # whatever it is, the others are told
        if not distributed.is_joined():
            raise
        distributed.fail(error, 1)
