import copy
import importlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pytest
from scripts import run as run_script

from jaxunet.augmentation_config import AugmentationConfig
from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.errors import ConfigError, DataError, RunError, Stopped
from jaxunet.interop.pytorch_unet import make_pytorch_unet
from jaxunet.interop.reproduction import FOLLOWED, check_followed, flips, train_pytorch
from jaxunet.learning.augment import random_flip
from jaxunet.runs.record import read_metrics
from jaxunet.runs.training import train


@pytest.mark.parametrize(
    ("augment", "optimizer"),
    [
        ("flip", OptimizerConfig(learning_rate=1e-2)),
        ("none", OptimizerConfig(learning_rate=2e-2, schedule="cosine", warmup_steps=2)),
    ],
)
def test_both_frameworks_train_alike_from_the_same_start(augment, optimizer, tmp_path):
    config = Config(
        data=DataConfig(
            image_size=32, prepared_dir=tmp_path, synthetic_train=20, synthetic_validation=6
        ),
        model=ModelConfig(width=4, depth=3),
        optimizer=optimizer,
        train=TrainConfig(
            epochs=2, batch_size=8, eval_batch_size=8, log_every=1, augment=augment
        ),
    )
    data = prepare(config.data, progress=False)
    theirs = train_pytorch(
        config, data.source("train"), data.source("validation"), progress=False
    )
    ours = train(config, data, tmp_path / "run", show_progress=False)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [line["values"]["loss"] for line in lines if "grad_norm" in line["values"]]
    assert len(losses) == 6
    np.testing.assert_allclose(theirs.losses, losses, rtol=1e-3)
    means = [v for line in lines if (v := line["values"].get("epoch_mean_loss"))]
    assert [e["train_loss"] for e in theirs.epochs] == pytest.approx(means, rel=1e-3)
    validation = [line["values"] for line in lines if line["split"] == "validation"]
    assert [e["loss"] for e in theirs.epochs] == pytest.approx(
        [v["loss"] for v in validation], rel=1e-3
    )
    found, expected = theirs.epochs[-1]["scores"], ours.summary["scores"]
    assert found["per_image"] == pytest.approx(expected["per_image"], abs=5e-3)


def test_the_flips_are_those_of_the_training_step():
    images = np.arange(2, dtype=np.uint8)[None, None, :, None] * np.ones((8, 2, 1, 3), np.uint8)
    from jaxunet.learning.augment import example_keys

    drawn = flips(seed=3, batch_size=8)
    seen = []
    for step in range(4):
        keys = example_keys(jax.random.key(3), jax.numpy.int32(step), jax.numpy.arange(8))
        flipped, _ = random_flip(
            keys, jax.numpy.asarray(images), jax.numpy.asarray(images[..., :1])
        )
        expected = np.asarray(flipped)[:, 0, 0, 0] == 1
        np.testing.assert_array_equal(drawn(step), expected)
        seen += expected.tolist()
    assert 4 < sum(seen) < 28


OTHERS = {  # of each field that has no obvious other value
    "momentum": 0.5, "weight_decay": 0.5, "warmup_steps": 3, "warmup_fraction": 0.5,
    "clip_norm": 1.0, "accumulate_steps": 2, "ema_decay": 0.9, "extended_at": (3,),
    "num_logits": 2, "eval_batch_size": 8, "depth": 3, "width": 8,
    "learning_rate": 0.5, "threshold": 0.3, "weights": "imagenet",
    "microbatch": 4,
    "augmentation": AugmentationConfig(noise=0.1),
}  # fmt: skip


def another(section, field):
    """`section` with another value of one of its fields."""
    now, hint = getattr(section, field.name), get_type_hints(type(section))[field.name]
    choices = [c for part in (hint, *get_args(hint)) for c in get_args(part)]
    if isinstance(now, bool):
        value = not now
    elif field.name in OTHERS:
        value = OTHERS[field.name]
    elif get_origin(hint) is Literal or type(None) in choices:
        value = next(c for c in choices if isinstance(c, str) and c != now)
    else:
        value = now + 1
    if field.name in ("weights", "encoder_statistics"):  # which the plain encoder can't have
        section = replace(section, encoder="resnet18", weights="imagenet")
    return replace(section, **{field.name: value})


@pytest.mark.parametrize("section", ["model", "optimizer", "train"])
def test_whatever_pytorchs_side_does_not_do_is_refused_by_name(section):
    part = getattr(Config(), section)
    for field in fields(part):
        name = f"{section}.{field.name}"
        config = replace(Config(), **{section: another(part, field)})
        if name in FOLLOWED:
            check_followed(config)
        else:
            with pytest.raises(ConfigError, match=re.escape(name)):
                check_followed(config)


@pytest.mark.parametrize("augment", ["standard", "strong"])
def test_more_than_flips_has_no_side_of_pytorchs(augment):
    config = Config(train=TrainConfig(augment=augment))
    with pytest.raises(ConfigError, match=rf"train\.augment: 'flip' -> '{augment}'"):
        check_followed(config)


def test_pixels_that_do_not_count_have_no_side_of_pytorchs():
    data = DataConfig(name="folder", dir=Path("own"))
    check_followed(Config(data=data))
    with pytest.raises(ConfigError, match=r"data\.ignore_value: None -> 9"):
        check_followed(Config(data=replace(data, ignore_value=9)))


def test_what_can_not_succeed_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    reproduce = importlib.import_module("reproduce")
    data = DataConfig()
    with pytest.raises(ConfigError, match="--seeds names no seed"):
        reproduce.check(reproduce.Arguments(data=data, seeds=(), out=tmp_path))
    lossy = reproduce.Arguments(
        data=data, train=TrainConfig(loss="dice"), against="pytorch", out=tmp_path
    )
    with pytest.raises(ConfigError, match=r"train\.loss: 'bce' -> 'dice'"):
        reproduce.check(lossy)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/results cannot be written to"):
        reproduce.check(reproduce.Arguments(data=data, out=tmp_path / "file" / "results"))
    reproduce.check(reproduce.Arguments(data=data, out=tmp_path / "new" / "results"))
    assert list((tmp_path / "new" / "results").iterdir()) == []


def test_a_seed_that_was_stopped_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    reproduce = importlib.import_module("reproduce")
    begun, config = [], Config(train=TrainConfig(seed=3))

    def stopped(config: Config, data: object, run: Path, *, resume: bool) -> None:
        begun.append((run, resume))
        raise Stopped("Go on with --resume --out elsewhere.", 15)

    monkeypatch.setattr(reproduce, "train", stopped)
    monkeypatch.setattr(reproduce, "train_reference", lambda *_: {"trained": len(begun)})
    arguments = reproduce.Arguments(data=config.data, resume=True, out=tmp_path)
    result = dict.fromkeys(reproduce.SAME)
    kept = reproduce.unfinished(arguments, 3, result)
    for _ in range(2):
        with pytest.raises(Stopped, match=r"^Stopped in seed 3, which is saved: go on with"):
            reproduce.train_seed(config, None, kept, pytorch=True)
    assert begun == 2 * [(kept / "run", True)]
    assert json.loads((kept / "pytorch.json").read_bytes()) == {"trained": 0}
    assert reproduce.unfinished(arguments, 3, result | {"flags": 1}) != kept
    assert reproduce.unfinished(arguments, 3, result).exists()
    assert not reproduce.unfinished(replace(arguments, resume=False), 3, result).exists()


def test_a_design_without_a_pytorch_side_is_refused():
    with pytest.raises(ConfigError, match="Only the reference design"):
        make_pytorch_unet(ModelConfig(norm="batch"))


def test_the_script_prints_one_table_and_writes_every_seed(tmp_path, monkeypatch):
    words = ("--data.name", "synthetic", "--data.image-size", 16, "--data.synthetic-train", 12)
    words += ("--data.synthetic-validation", 5, "--model.width", 4, "--model.depth", 2)
    words += ("--data.prepared-dir", tmp_path / "data", "--train.epochs", 2)
    words += ("--against", "pytorch", "--seeds", 0, 1, "--out", tmp_path, "--name", "small")
    # Seed 0 alone first, as if it had been stopped after that.
    run_script("reproduce.py", *words[:-7], "--seeds", 0, *words[-4:])
    alone = json.loads((tmp_path / "small.json").read_text())["runs"]
    output = run_script("reproduce.py", *words, "--resume")
    for expected in ("synthetic: 12 train, 5 validation", "reported", "PyTorch", "jaxunet"):
        assert expected in output
    assert re.search(r"dice, batch of 4 +│ +0\.8494 │ +0\.\d{4} ± 0\.\d{4}", output)
    found = json.loads((tmp_path / "small.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert found["runs"][:1] == alone  # not trained again: its seconds are the same
    by_hand = [
        run["jaxunet"]["scores"]["per_image"]["iou"]
        - run["pytorch"]["scores"]["per_image"]["iou"]
        for run in found["runs"]
    ]
    mean, half = sum(by_hand) / 2, 12.7062 * abs(by_hand[0] - by_hand[1]) / 2
    difference = found["difference"]["per_image"]["iou"]
    assert difference["mean"] == pytest.approx(mean)
    assert difference["interval"] == pytest.approx([mean - half, mean + half], rel=1e-4)
    for run in found["runs"]:
        theirs, ours = run["pytorch"], run["jaxunet"]
        assert len(ours["losses"]) == 2 * 2
        np.testing.assert_allclose(theirs["losses"], ours["losses"], rtol=1e-3)
        assert len(ours["epochs"]) == len(theirs["epochs"]) == 2
        assert theirs["seconds"] > 0
        assert ours["images_per_second"] > 0
    assert found["runs"][0]["jaxunet"]["losses"] != found["runs"][1]["jaxunet"]["losses"]
    assert found["versions"]["torch"]
    assert (tmp_path / "small.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("small-seed-*"))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    reproduce = importlib.import_module("reproduce")
    path = tmp_path / "small.json"
    assert reproduce.trained_before(path, found) == found["runs"]
    assert reproduce.trained_before(tmp_path / "none.json", found) == []
    other = copy.deepcopy(found)
    other["config"]["optimizer"]["learning_rate"] = 0.5
    with pytest.raises(DataError, match=r"optimizer\.learning_rate: 0\.0001 -> 0\.5"):
        reproduce.trained_before(path, other)
    without = copy.deepcopy(found)
    del without["versions"]["torch"]  # as without --against pytorch
    with pytest.raises(DataError, match=r"versions\.torch: '.*' -> None"):
        reproduce.trained_before(path, without)
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(DataError, match=r"odd\.json is no result of reproduce"):
        reproduce.trained_before(tmp_path / "odd.json", found)
