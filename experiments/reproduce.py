"""The reference protocol, beside PyTorch: `reproduce.py --data.dir DIR [--against pytorch]`."""

import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from command_line import Configured, parse, run_script
from presets import reference
from rich.console import Console
from rich.table import Table

from jaxunet.bench.card import card, cudnn_version, share_memory, use_tf32
from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.data import Prepared, prepare
from jaxunet.devices import tuning
from jaxunet.devices.environment import command_line, environment
from jaxunet.errors import ConfigError, DataError, Stopped
from jaxunet.files import check_writable, write_json
from jaxunet.provenance import disagreement
from jaxunet.runs.evaluation import describe_split
from jaxunet.runs.figures import loss_comparison
from jaxunet.runs.record import read_metrics
from jaxunet.runs.training import train

REPORTED = {"dice": 0.8494, "iou": 0.7480}
PROTOCOLS = ("batch_of_4", "per_image")
SAME = ("config", "train", "validation", "versions", "devices", "tuning", "flags")
"""What all seeds of one result have in common."""
LABELS = {"pytorch": "PyTorch", "jaxunet": "jaxunet"}


@dataclass(frozen=True)
class Arguments(tuning.Tuning, Configured):
    against: Literal["nothing", "pytorch"] = "nothing"
    """Also train the reference in PyTorch on the same weights, order and flips. It takes its
    images from the device's memory; --data.cache device has jaxunet do so too."""
    tf32: bool = True
    """Whether float32 products may be rounded to TF32 on an NVIDIA GPU, in both frameworks."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to repeat it with; more than one gives mean and spread."""
    resume: bool = False
    """Keep the seeds that NAME.json has already, go on with the one that was stopped, and train
    the others."""
    out: Path = field(default_factory=lambda: Path("experiments/results"))
    """Folder for NAME.json and NAME.png."""
    name: str = "reproduction"
    """Name of the two files."""


def train_jaxunet(config: Config, data: Prepared, run: Path) -> dict[str, Any]:
    """Train by the reference protocol with jaxunet's own loop, logging every step.

    Raises:
        Stopped: a signal came; what `run` has is gone on with.
    """
    config = replace(config, train=replace(config.train, log_every=1))
    try:
        outcome = train(config, data, run, resume=True)
    except Stopped as error:
        raise Stopped(
            f"Stopped in seed {config.train.seed}, which is saved: go on with --resume.",
            error.signal,
        ) from error
    lines = read_metrics(run / "metrics.jsonl")
    validation = [line["values"] for line in lines if line["split"] == "validation"]
    train_lines = [line["values"] for line in lines if line["split"] == "train"]
    means = [v["epoch_mean_loss"] for v in train_lines if "epoch_mean_loss" in v]
    count = data.count(config.data.train_split) * config.train.epochs
    return {
        "losses": [values["loss"] for values in train_lines if "loss" in values],
        "epochs": [
            {"train_loss": mean, "loss": values["loss"]}
            for mean, values in zip(means, validation, strict=True)
        ],
        "scores": outcome.summary["scores"],
        "seconds": outcome.summary["wall_seconds"],
        "images_per_second": count / outcome.summary["wall_seconds"],
    }


def train_reference(config: Config, data: Prepared) -> dict[str, Any]:
    """The same in PyTorch."""
    from jaxunet.interop.reproduction import train_pytorch  # PyTorch only where asked for

    sources = (data.source(config.data.train_split), data.source(config.data.validation_split))
    result = dataclasses.asdict(train_pytorch(config, *sources))
    result["scores"] = result["epochs"][-1].pop("scores")
    for epoch in result["epochs"]:
        epoch.pop("scores", None)
    return result


def train_seed(config: Config, data: Prepared, kept: Path, *, pytorch: bool) -> dict[str, Any]:
    """One seed's run with jaxunet and before it, if asked for, PyTorch's.

    Args:
        kept: folder of what is done of it; a later call goes on from there.
    """
    run: dict[str, Any] = {"seed": config.train.seed}
    if pytorch:
        done = kept / "pytorch.json"
        if not done.exists():
            write_json(done, train_reference(config, data))
        run["pytorch"] = json.loads(done.read_bytes())
    return {**run, "jaxunet": train_jaxunet(config, data, kept / "run")}


def differences(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """jaxunet less PyTorch by protocol and score: the mean over seeds and, where there are
    several, its 95% `interval` by Student's t, as the seeds' weights are drawn alike."""
    from scipy.stats import t  # late: it takes most of a second

    pairs = [(run["jaxunet"]["scores"], run["pytorch"]["scores"]) for run in runs]

    def difference(protocol: str, score: str) -> dict[str, Any]:
        by_seed = [ours[protocol][score] - theirs[protocol][score] for ours, theirs in pairs]
        mean, count = statistics.mean(by_seed), len(by_seed)
        if count == 1:
            return {"mean": mean}
        half = float(t.ppf(0.975, count - 1)) * statistics.stdev(by_seed) / count**0.5
        return {"mean": mean, "interval": [mean - half, mean + half]}

    return {
        protocol: {score: difference(protocol, score) for score in ("dice", "iou")}
        for protocol in PROTOCOLS
    }


def trained_before(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs in `path`, none if there is no such file.

    Raises:
        DataError: they are not of what `result` describes.
    """
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_bytes())
        runs = list(record["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no result of reproduce.py; leave out --resume, or give another --name."
        ) from error
    changed = disagreement(
        {name: record.get(name) for name in SAME},
        json.loads(json.dumps({name: result[name] for name in SAME})),
        recorded=f"{path}, which --resume is to go on with,",
        there="what is to be trained now",
        ignore=("config.data.dir", "config.data.prepared_dir"),
    )
    if changed:
        raise DataError(f"{changed} Leave out --resume, or give another --name.")
    return runs


def unfinished(arguments: Arguments, seed: int, result: dict[str, Any]) -> Path:
    """Folder for what is done of a seed, empty but with --resume; of another one's settings it
    has another name."""
    what = json.dumps({name: result[name] for name in SAME}, sort_keys=True)
    digest = hashlib.sha256(what.encode()).hexdigest()[:8]
    folder = arguments.out / f"{arguments.name}-seed-{seed}-{digest}"
    if folder.exists() and not arguments.resume:
        shutil.rmtree(folder)
    return folder


def check(arguments: Arguments) -> None:
    """Raise whatever would else be noticed after hours of training."""
    if not arguments.seeds:
        raise ConfigError("--seeds names no seed; give one or more, such as --seeds 0 1 2.")
    if arguments.against == "pytorch":
        from jaxunet.interop.reproduction import check_followed

        check_followed(arguments.config)
    check_writable(arguments.out, "--out")


def spread(values: list[float], digits: int = 4) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def signed(difference: dict[str, Any]) -> str:
    ends = [f"{end:+.4f}" for end in difference.get("interval", ())]
    return f"{difference['mean']:+.4f}" + (f" ({' to '.join(ends)})" if ends else "")


def show(result: dict[str, Any]) -> None:
    """One table: reported, PyTorch here, jaxunet here."""
    present = [name for name in LABELS if result["runs"][0].get(name)]
    dataset = result["validation"]
    counts = f"{result['train']['count']} train, {dataset['count']} validation"
    unofficial = dataset["unofficial_splits"]
    parts = ", ".join(f"{name} {counts}" for name, counts in unofficial.items())
    note = f"; NOT the official data: {parts}" if unofficial else ""
    table = Table(title=f"{dataset['name']}: {counts}{note}", title_justify="left")
    paired = result.get("difference")
    headings = ["", "reported", *(f"{LABELS[name]} here" for name in present)]
    for column in [*headings, *(["jaxunet less PyTorch (95%)"] if paired else [])]:
        table.add_column(column, justify="right" if column else "left")

    def row(
        label: str, reported: str, value: Any, digits: int = 4, difference: str = ""
    ) -> None:
        values = [[value(run[name]) for run in result["runs"]] for name in present]
        cells = [spread(each, digits) for each in values]
        table.add_row(label, reported, *cells, *([difference] if paired else []))

    for protocol in PROTOCOLS:
        for score in ("dice", "iou"):
            reported = f"{REPORTED[score]:.4f}" if protocol == "batch_of_4" else ""
            label = f"{score}, {protocol.replace('_', ' ')}"
            shown = "" if not paired else signed(paired[protocol][score])
            row(
                *(label, reported, lambda r, p=protocol, s=score: r["scores"][p][s]),
                difference=shown,
            )
    for epoch in range(len(result["runs"][0]["jaxunet"]["epochs"])):
        row(
            f"training loss, epoch {epoch + 1}",
            "",
            lambda r, e=epoch: r["epochs"][e]["train_loss"],
        )
    row("seconds", "", lambda r: r["seconds"], 1)
    row("training images/s", "", lambda r: r["images_per_second"], 1)
    Console(width=110).print(table)


def main() -> None:
    start = reference()
    default = Arguments(start.data, start.model, start.optimizer, start.train)
    arguments = parse(Arguments, "Reproduce the reference's protocol.", default)
    tuning.use(arguments)
    check(arguments)
    pytorch = arguments.against == "pytorch"
    if pytorch:
        share_memory()
    tf32 = use_tf32(arguments.tf32, pytorch=pytorch)
    config = arguments.config
    data = prepare(config.data)
    size = config.data.image_size
    result: dict[str, Any] = {
        "reported": {"protocol": "batch_of_4", **REPORTED},
        "train": describe_split(data, config.data.train_split, size),
        "validation": describe_split(data, config.data.validation_split, size),
        "config": to_dict(config),
        "command": command_line(),
        "flags": {"tf32": tf32, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "card": card(),
        "cudnn": cudnn_version(),
        **environment(*(["torch"] if pytorch else [])),
    }
    path = arguments.out / f"{arguments.name}.json"
    runs = result["runs"] = trained_before(path, result) if arguments.resume else []
    done = {run["seed"] for run in runs}

    def save() -> None:
        if pytorch:
            result["difference"] = differences(runs)
        write_json(path, result)

    for seed in arguments.seeds:
        if seed in done:
            continue
        seeded = replace(config, train=replace(config.train, seed=seed))
        kept = unfinished(arguments, seed, result)
        runs.append(train_seed(seeded, data, kept, pytorch=pytorch))
        save()  # after each seed: an interrupted run keeps the others
        shutil.rmtree(kept)
    save()  # of seeds trained before, too
    curves: dict[str, list[float]] = {
        label: runs[0][name]["losses"] for name, label in LABELS.items() if name in runs[0]
    }
    loss_comparison(
        curves,
        path.with_suffix(".png"),
        f"Training loss, seed {runs[0]['seed']}: {config.train.epochs} epochs, width "
        f"{config.model.width}, {size} px",
    )
    show(result)
    print(f"Written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
