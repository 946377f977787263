"""Made v0.1.tar.gz with version 0.1, commit 4f96876: `PYTHONPATH=CHECKOUT python make.py`.

Two tiny runs of two epochs, `plain` and `averaged` (batch norm and averaged weights), and in
`expected.json` of each what version 0.1 itself made of it: the counts on the test split, the
probabilities for a picture, and what it logged for one epoch more.
"""

import json
import shutil
import sys
import tarfile
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import make_strategy
from jaxunet.learning.steps import eval_step
from jaxunet.runs import training
from jaxunet.runs.evaluation import evaluate
from jaxunet.runs.loading import compile_probabilities, load
from jaxunet.runs.record import read_metrics

BASE = Config(
    data=DataConfig(image_size=16, stored_size=16, synthetic_train=8, synthetic_validation=4),
    model=ModelConfig(width=2, depth=2),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8, log_every=1),
)
CONFIGS = {
    "plain": BASE,
    "averaged": replace(
        BASE,
        model=replace(BASE.model, norm="batch"),
        optimizer=replace(BASE.optimizer, ema_decay=0.9),
    ),
}


def make(run: Path, config: Config) -> None:
    data = prepare(config.data, progress=False)
    training.train(config, data, run, show_progress=False)
    shutil.rmtree(run / "tensorboard")
    shutil.rmtree(run / "checkpoints" / "1")

    model, strategy = load(run), make_strategy("pmap")
    feed = Feed(strategy, data.source("test"), config.data, progress=False)
    compiled = feed.compile(partial(eval_step, model.recipe), outputs="replicated")
    variables = strategy.replicate(model.variables)
    found = evaluate(feed, compiled, variables, config, progress=False)
    picture = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    probabilities = compile_probabilities(strategy, model.recipe, model.variables)(picture)

    longer = run.with_name(f"{run.name}-longer")
    shutil.copytree(run, longer)
    training.train(
        replace(config, train=replace(config.train, epochs=3)),
        data,
        longer,
        resume=True,
        show_progress=False,
    )
    lines = [line for line in read_metrics(longer / "metrics.jsonl") if line["step"] == 3]
    for line in lines:
        del line["wall_seconds"]
    expected = {
        "test_counts": found.counts.tolist(),
        "probabilities": probabilities[0, :, :, 0].round(6).tolist(),
        "third_epoch": lines,
    }
    (run / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    training.write_figures = lambda *_args, **_options: []
    made = Path(__file__).with_name("v0.1.tar.gz")
    with tempfile.TemporaryDirectory() as work, tarfile.open(made, "w:gz") as archive:
        for name, config in CONFIGS.items():
            make(Path(work) / name, config)
            archive.add(Path(work) / name, name)


if __name__ == "__main__":
    sys.exit(main())
