"""Rows of the table: options of the command line, and PyTorch weights."""

import os
import pickle
import struct
from collections.abc import Callable
from typing import Any

import torch
from ground import World
from rows import Refused, Row


def trained(name: str, words: list[object], message: str, status: int = 1) -> Row:
    """`train.py` with these words, on own/."""

    def command(world: World) -> list[object]:
        _, dataset, *data = world.prepare_command("folder")
        preset = [] if not words or str(words[0])[0] == "-" else words[:1]
        small = ["--model.width", 2, "--model.depth", 2, "--optimizer.warmup-steps", 0]
        out = ["--data.name", dataset, *data, *small, "--out", world.path / "new"]
        return ["train.py", *preset, *out, *words[len(preset) :]]

    return Row(name, command, Refused(message, status))


def imported(name: str, breaks: Callable[[World], object], message: str) -> Row:
    """`import_pytorch.py weights.pth`, in which something is wrong."""

    def command(world: World) -> list[object]:
        file = breaks(world) or world.path / "weights.pth"
        return ["import_pytorch.py", file, "--out", world.path / "new"]

    return Row(name, command, Refused(message))


class Hostile:
    """Pickled, a command to be run by whoever loads it."""

    def __init__(self, world: World):
        self.world = world

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.world.path / 'ran'}",)


def weights(world: World, value: object) -> None:
    torch.save(value, world.path / "weights.pth")


NOT_LOADED = r"weights\.pth was not loaded as a PyTorch weight file:"

ROWS = [
    # Options.
    trained(
        "NaN learning rate",
        ["--optimizer.learning-rate", "nan"],
        "learning_rate is nan, but must be a positive number",
        2,
    ),
    trained(
        "negative learning rate",
        ["--optimizer.learning-rate", -1],
        r"learning_rate is -1\.0, but",
        2,
    ),
    trained(
        "negative batch size",
        ["--train.batch-size", -8],
        "train.batch_size is -8, but must be at least 1",
        2,
    ),
    trained(
        "negative image size",
        ["--data.image-size", -256],
        "data.image_size is -256, but must be at least 1",
        2,
    ),
    trained(
        "infinite weight decay",
        ["--optimizer.weight-decay", "inf"],
        "weight_decay is inf, but",
        2,
    ),
    trained(
        "seed of thirty digits",
        ["--train.seed", "9" * 30],
        r"train\.seed is 9{30}, but must be from 0 to 2\*\*63 - 1",
        2,
    ),
    trained(
        "unknown preset",
        ["referense"],
        "There is no preset 'referense'; did you mean 'reference'",
    ),
    trained(
        "unknown option",
        ["--train.epoch", 3],
        r"Unrecognized options: --train\.epoch.*--train\.epochs",
        2,
    ),
    trained(
        "unknown choice",
        ["--train.loss", "bce-dice"],
        r"invalid choice 'bce-dice'.*bce_dice",
        2,
    ),
    trained("word for a number", ["--train.epochs", "many"], "many", 2),
    trained(
        "image smaller than the depth allows",
        ["--model.depth", 6],
        "data.image_size is 16, but must be at least 32",
        2,
    ),
    trained(
        "batch not divisible by the devices",
        ["--train.batch-size", 12],
        "train.batch_size is 12, which the 8 devices do not divide evenly; use 8 or 16",
    ),
    trained(
        "evaluation batch not divisible by the devices",
        ["--train.eval-batch-size", 4],
        "train.eval_batch_size is 4, which the 8 devices .* use 8",
    ),
    trained(
        "unknown split",
        ["--train.batch-size", 8, "--train.eval-batch-size", 8, "--data.train-split", "trian"],
        "folder has no split 'trian' here; it has train, validation",
    ),
    trained(
        "malformed slice of a split",
        [
            "--train.batch-size",
            8,
            "--train.eval-batch-size",
            8,
            "--data.train-split",
            "train[:lots]",
        ],
        r"Split 'train\[:lots\]' cannot be read",
    ),
    Row(
        "preparing an unknown dataset",
        lambda world: ["prepare_data.py", "isic2017"],
        Refused("DATASET is 'isic2017', but must be one of synthetic, isic2018, folder"),
    ),
    Row(
        "--out is a file",
        lambda world: [
            "train.py",
            "--resume",
            "--data.prepared-dir",
            world.path / "prepared",
            "--data.synthetic-train",
            8,
            "--data.synthetic-validation",
            8,
            "--out",
            world.path / "weights.pth",
        ],
        Refused(r"--out weights\.pth cannot be written to: File exists", leaves="prepared"),
    ),
    # Weights.
    imported(
        ".pth that would run code",
        lambda world: weights(world, {"out.bias": Hostile(world)}),
        rf"{NOT_LOADED} it would run code \(posix\.system\)\. Ask for a \.safetensors",
    ),
    imported(
        "plain pickle that would run code",
        lambda world: (world.file("weights.pth", pickle.dumps(Hostile(world), 2)), None)[1],
        rf"{NOT_LOADED} it would run code \(posix\.system\)",
    ),
    imported(
        "truncated .pth",
        lambda world: world.edit("weights.pth", lambda file: file[: len(file) // 2]),
        rf"{NOT_LOADED} it is none, or damaged",
    ),
    imported(
        "truncated .safetensors",
        lambda world: (
            world.edit("weights.safetensors", lambda file: file[:-100])
            or world.path / "weights.safetensors"
        ),
        r"weights\.safetensors is not a readable \.safetensors file",
    ),
    imported(
        ".safetensors with a header of 2**60 bytes",
        lambda world: world.file("weights.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        r"weights\.safetensors was not loaded",
    ),
    imported(
        "text named .pth",
        lambda world: (world.file("weights.pth", "version https://git-lfs"), None)[1],
        rf"{NOT_LOADED} it is none, or damaged",
    ),
    imported(
        "weights of another network",
        lambda world: weights(world, {"fc.weight": torch.ones(3)}),
        r"weights\.pth cannot be imported\. .* not the weights of .* Found: fc\.weight",
    ),
    imported(
        "weights that are a list",
        lambda world: weights(world, [1, 2]),
        r"weights\.pth holds a list, not a state_dict",
    ),
    imported(
        "weights that are a folder",
        lambda world: world.path / "run",
        "run cannot be read: Is a directory",
    ),
]
