"""Makes the runs that later versions are tested with, once a release.

    python tests/runs/make.py

It writes `vVERSION.tar.xz`: tiny runs of two epochs, and in `expected.json` of each what this
version makes of it, which are the counts on the test split, the probabilities for a picture,
and what is logged for one epoch more. `test_earlier_versions.py` has every later version do the
same. Give `CONFIGS` what is new. (`v0.1.tar.gz` was made by version 0.1, commit 4f96876.)
"""

import json
import shutil
import tarfile
import tempfile
import tomllib
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

ROOT = Path(__file__).parents[2]

BASE = Config(
    data=DataConfig(image_size=16, stored_size=16, synthetic_train=8, synthetic_validation=4),
    model=ModelConfig(width=2, depth=2),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8, log_every=1),
)
CONFIGS = {
    "grouped": replace(
        BASE,
        model=replace(BASE.model, norm="group", init="he", skip="pad"),
        optimizer=replace(BASE.optimizer, name="adamw", ema_decay=0.9, clip_norm=1.0),
        train=replace(BASE.train, augment="standard", loss="bce_dice", patience=5),
    ),
}


def make(run: Path, config: Config) -> None:
    data = prepare(config.data, progress=False)
    training.train(config, data, run, show_progress=False)
    for left_out in ("tensorboard", "tuning", "checkpoints/1"):
        shutil.rmtree(run / left_out, ignore_errors=True)

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


def nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """As anybody's, of no time: what is made twice differs less."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    made = Path(__file__).with_name(f"v{version}.tar.xz")
    training.write_figures = lambda *_args, **_options: []
    with tempfile.TemporaryDirectory() as work:
        for name, config in CONFIGS.items():
            make(Path(work) / name, config)
        with tarfile.open(made, "w:xz", preset=9) as archive:
            for name in CONFIGS:
                archive.add(Path(work) / name, name, filter=nobodys)
    print(f"{made}: {made.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
