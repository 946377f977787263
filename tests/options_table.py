"""Runs in which every two values of any two options meet, and what each run must do.

The table is drawn by a greedy search from a seed, the same every time: a row at a time, the
candidate that holds most pairs not yet seen.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from small_data import encoded, write_files

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import Prepared, prepare
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.record import read_metrics
from jaxunet.runs.reporting import Outcome
from jaxunet.runs.training import Trainer, train

OPTIONS: dict[str, tuple[Any, ...]] = {
    "loss": ("bce", "dice", "bce_dice", "jaccard", "focal", "tversky", "lovasz"),
    "schedule": ("constant", "cosine"),
    "warmup_steps": (0, 3),
    "norm": ("none", "batch", "group"),
    "devices": (1, 2, 4),
    "name": ("adam", "adamw", "sgd"),
    "cache": ("none", "host", "device"),
    "workers": (0, 1),
    "ema_decay": (None, 0.8),
    "accumulate_steps": (1, 2),
    "clip_norm": (None, 1.0),
    "dtype": ("float32", "bfloat16"),
    "remat": (False, True),
    "augment": ("none", "flip", "standard"),
    "ignore_value": (None, 128),
    "killed": ("in an epoch", "after one"),
}
Row = dict[str, Any]
SIDE, PICTURES, EPOCHS = 16, 400, 2
RATES = {"adam": 0.02, "adamw": 0.02, "sgd": 0.3}


def clash(row: Row) -> bool:
    return bool(row.get("workers")) and row.get("cache", "none") != "none"


def pairs(row: Row) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    in_order = [(name, row[name]) for name in OPTIONS if name in row]
    return set(itertools.combinations(in_order, 2))


@cache
def table() -> list[Row]:
    """Rows that hold every pair of values of `OPTIONS` but for those that clash."""
    chance = random.Random(2)  # of the first seeds, one of few rows
    missing = {
        pair
        for a, b in itertools.combinations(OPTIONS, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
        if not clash(dict(pair := ((a, x), (b, y))))
    }
    rows = []

    def candidate() -> Row:
        """A pair that is missing, and for one option after the other its best value."""
        row = dict(chance.choice(listed))
        for name in chance.sample(list(OPTIONS), len(OPTIONS)):
            values = chance.sample(OPTIONS[name], len(OPTIONS[name]))
            choices = [row | {name: value} for value in values]
            if name not in row:
                fitting = [each for each in choices if not clash(each)]
                row = max(fitting, key=lambda each: len(pairs(each) & missing))
        return row

    while missing:
        listed = sorted(missing, key=repr)
        rows.append(
            max((candidate() for _ in range(15)), key=lambda r: len(pairs(r) & missing))
        )
        missing -= pairs(rows[-1])
    return rows


def described(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def draw_discs(folder: Path, ignore_value: int | None) -> None:
    """Pairs of a bright disc on a dark ground, somewhere in the picture, and its mask.

    With an `ignore_value` the mask has that in a column and round its edge.
    """
    rng = np.random.default_rng(0)
    rows, columns = np.indices((SIDE, SIDE))
    for split, count in {"train": PICTURES, "validation": 9}.items():
        images, masks = {}, {}
        for number in range(count):
            y, x = rng.uniform(4, SIDE - 4, 2)
            distance, radius = np.hypot(rows - y, columns - x), rng.uniform(3, 6)
            disc = distance < radius
            mask = disc.astype(np.uint8) * 255
            if ignore_value is not None:
                mask[:, 3] = mask[np.abs(distance - radius) < 0.5] = ignore_value
            image = rng.integers(0, 60, (SIDE, SIDE, 3)) + 180 * disc[..., np.newaxis]
            images[f"{number:03d}.png"] = encoded(image.astype(np.uint8))
            masks[f"{number:03d}.png"] = encoded(mask)
        write_files(folder / split / "images", images)
        write_files(folder / split / "masks", masks)


Discs = dict[int | None, tuple[DataConfig, Prepared]]


def prepared_discs(folder: Path) -> Discs:
    """By what is ignored in masks."""
    found: Discs = {}
    for value in OPTIONS["ignore_value"]:
        draw_discs(folder / f"discs-{value}", value)
        config = DataConfig(
            name="folder",
            dir=folder / f"discs-{value}",
            prepared_dir=folder / "prepared",
            stored_size=SIDE,
            image_size=SIDE,
            ignore_value=value,
        )
        found[value] = config, prepare(config, progress=False)
    return found


def configuration(row: Row, data: DataConfig) -> Config:
    learning = ("name", "schedule", "warmup_steps", "ema_decay", "accumulate_steps")
    return Config(
        data=dataclasses.replace(data, cache=row["cache"], workers=row["workers"]),
        model=ModelConfig(
            width=4,
            depth=2,
            init="he",
            norm=row["norm"],
            dtype=row["dtype"],
            remat=row["remat"],
        ),
        optimizer=OptimizerConfig(
            learning_rate=RATES[row["name"]],
            clip_norm=row["clip_norm"],
            **{name: row[name] for name in learning},
        ),
        train=TrainConfig(
            epochs=EPOCHS,
            batch_size=8,
            eval_batch_size=4,
            loss=row["loss"],
            augment=row["augment"],
            log_every=1,
            checkpoint_every=26,
        ),
    )


class Killed(BaseException):
    """The end of a process, as far as one process can have it."""


class Dying:
    """Batches, and an end in place of one."""

    def __init__(self, batches: Any, count: int):
        self.batches, self.left = batches, count

    def __next__(self) -> Any:
        if not self.left:
            raise Killed
        self.left -= 1
        return next(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


@contextmanager
def on_devices(count: int) -> Iterator[None]:
    some = jax.devices()[:count]
    with (
        mock.patch.object(jax, "devices", return_value=some),
        mock.patch.object(jax, "local_devices", return_value=some),
    ):
        # Programs are compiled for longer than they run here.
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def kill_and_resume(config: Config, data: Prepared, out: Path, killed: str) -> Outcome:
    """A run under `jit` that ends at once, in its second epoch or before it, and goes on."""

    def trainer(run: RunDirectory) -> Trainer:
        return Trainer(config, data, run, parallel="jit", show_progress=False)

    with RunDirectory(out, config, resume=False) as run:
        first = trainer(run)
        count = first.order.batches_per_epoch + 3 * (killed == "in an epoch")
        first.batches = Dying(first.batches, count)
        with pytest.raises(Killed):
            first.train()
    with RunDirectory(out, config, resume=True) as run:
        second = trainer(run)
        # The same programs, without the time to compile them again.
        second.train_step, second.eval_step = first.train_step, first.eval_step
        return second.train()


def lines(run: Path) -> list[tuple[int, str, dict[str, float]]]:
    """What metrics.jsonl says, without the time it took."""
    return [
        (line["step"], line["split"], line["values"])
        for line in read_metrics(run / "metrics.jsonl")
    ]


def check(row: Row, discs: Discs, out: Path) -> None:
    """The run of `row` learns, and alike under the other strategy though killed there."""
    data_config, data = discs[row["ignore_value"]]
    config = configuration(row, data_config)
    with on_devices(row["devices"]):
        whole = train(config, data, out / "whole", parallel="pmap", show_progress=False)
        resumed = kill_and_resume(config, data, out / "killed", row["killed"])
    for outcome in (whole, resumed):
        assert outcome.summary["scores"]["per_image"]["dice"] >= 0.8
    close = 1e-3 if row["dtype"] == "float32" else 5e-2
    expected = lines(out / "whole")
    found = lines(out / "killed")
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    for (step, split, values), (_, _, others) in zip(found, expected, strict=True):
        assert values == pytest.approx(others, rel=close, abs=close), (step, split)
    for a, b in zip(*map(jax.tree.leaves, (resumed.state, whole.state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=close, atol=close)
