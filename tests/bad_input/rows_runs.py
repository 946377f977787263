"""Rows of the table: run directories, and pictures to predict."""

import json
import re
import shutil
from collections.abc import Callable

from ground import World, sound_picture
from rows import Refused, Row, Taken
from rows_pictures import png
from small_data import encoded


def evaluated(name: str, breaks: Callable[[World], object], message: str) -> Row:
    """`evaluate.py run`, in which something is wrong."""

    def command(world: World) -> list[object]:
        breaks(world)
        return ["evaluate.py", world.path / "run"]

    return Row(name, command, Refused(message))


def resumed(name: str, breaks: Callable[[World], object], message: str) -> Row:
    """`train.py --resume --out run`, in which something is wrong."""

    def command(world: World) -> list[object]:
        breaks(world)
        return ["train.py", "--resume", "--train.epochs", 2, "--out", world.path / "run"]

    return Row(name, command, Refused(message))


def edited(section: str, **values: object) -> Callable[[World], None]:
    """The run's config.json with these values, as an editor would leave it."""

    def breaks(world: World) -> None:
        record = json.loads((world.path / "run/config.json").read_text())
        record["config"][section].update(values)
        world.file("run/config.json", json.dumps(record))

    return breaks


def leave_checkpoints_alone(world: World) -> None:
    for path in (world.path / "run").iterdir():
        if path.is_file():
            path.unlink()
        elif path.name != "checkpoints":
            shutil.rmtree(path)


def resumed_without_a_pair(world: World) -> list[object]:
    for folder in ("images", "masks"):
        world.file(f"own/train/{folder}/f.png", None)
    return ["train.py", "--resume", "--train.epochs", 2, "--out", world.path / "run"]


def predicted(
    name: str, breaks: Callable[[World], list[object]], outcome: Refused | Taken
) -> Row:
    """`predict.py run` on what `breaks` gives."""

    def command(world: World) -> list[object]:
        return ["predict.py", world.path / "run", *breaks(world), "--out", world.path / "new"]

    return Row(name, command, outcome)


def among_good(world: World, contents: bytes | None) -> list[object]:
    world.file("own/train/images/b.png", contents)
    return [world.path / "own/train/images"]


def others_done(reason: str) -> Taken:
    """Picture b is reported, and the masks of all others are there."""

    def check(world: World, output: str) -> None:
        assert re.search(f"not predicted: .*{reason}", output)
        masks = {path.name[0] for path in (world.path / "new").glob("*_segmentation.png")}
        assert masks == set("acdef")

    return Taken(check, status=1)


CONFIG = r"run/config\.json is not a run's configuration: "
UNDO = "Undo what was changed in it"
CHECKPOINT = "The checkpoint of step 1 in run/checkpoints"

ROWS = [
    # Run directories.
    evaluated(
        "run that is not there",
        lambda world: (world.path / "run").rename(world.path / "moved"),
        "run is not a run directory: config.json is not there",
    ),
    evaluated(
        "config.json cut short",
        lambda world: world.edit("run/config.json", lambda text: text[:100]),
        rf"{CONFIG}.*Unterminated string.* {UNDO}",
    ),
    evaluated(
        "config.json with a word for a number",
        edited("train", epochs="many"),
        rf"{CONFIG}train\.epochs is 'many', but must be int\. {UNDO}",
    ),
    evaluated(
        "config.json with an unknown field",
        edited("train", epoch=3),
        rf"{CONFIG}Unknown field train\.epoch; known here: epochs, .* {UNDO}",
    ),
    evaluated(
        "config.json with a value that is not allowed",
        edited("model", norm="layer"),
        rf"{CONFIG}model\.norm is 'layer', but must be 'none', 'batch', 'group'\. {UNDO}",
    ),
    evaluated(
        "config.json with NaN",
        lambda world: world.edit(
            "run/config.json",
            lambda text: re.sub(rb'("learning_rate"): [\d.]+', rb"\1: NaN", text),
        ),
        rf"{CONFIG}.*learning_rate is nan, but must be .* {UNDO}",
    ),
    evaluated(
        "config.json without its config",
        lambda world: world.file("run/config.json", "{}"),
        rf"{CONFIG}There is no field 'config'\. {UNDO}",
    ),
    evaluated(
        "config.json that holds a list",
        lambda world: world.file("run/config.json", "[1]"),
        rf"{CONFIG}There is no field 'config'\. {UNDO}",
    ),
    evaluated(
        "config.json nested without end",
        lambda world: world.file("run/config.json", "[" * 100_000),
        rf"{CONFIG}maximum recursion.* {UNDO}",
    ),
    evaluated(
        "config.json in another encoding",
        lambda world: world.file("run/config.json", b'{"config": "\xff"}'),
        rf"{CONFIG}.*can't decode byte 0xff .* {UNDO}",
    ),
    evaluated(
        "checkpoint of another width",
        edited("model", width=4),
        rf"{CHECKPOINT} is of another model .*: params\.\S+ is .*\[2\], expected .*\[4\]",
    ),
    evaluated(
        "checkpoint of another depth",
        edited("model", depth=3),
        rf"{CHECKPOINT} cannot be read with this configuration: .*level_1",
    ),
    evaluated(
        "checkpoint of another normalisation",
        edited("model", norm="batch"),
        rf"{CHECKPOINT} cannot be read with this configuration: .*batch_stats",
    ),
    evaluated(
        "checkpoint without its arrays",
        lambda world: world.file(world.glob("run/checkpoints/1/state/manifest.ocdbt"), None),
        rf"{CHECKPOINT} cannot be read",
    ),
    evaluated(
        "checkpoint with garbled scores",
        lambda world: world.file("run/checkpoints/1/metrics/metrics", "{"),
        rf"{CHECKPOINT} is damaged: metrics cannot be read .* Move it away",
    ),
    evaluated(
        "checkpoint with garbled progress",
        lambda world: world.file("run/checkpoints/1/progress/metadata", "{}"),
        rf"{CHECKPOINT} is damaged: its contents are not those of its checksum",
    ),
    resumed(
        "resumed with garbled progress",
        lambda world: world.file("run/checkpoints/1/progress/metadata", "{}"),
        rf"{CHECKPOINT} is damaged: its contents are not those of its checksum",
    ),
    resumed(
        "resumed after metrics.jsonl was edited",
        lambda world: world.edit("run/metrics.jsonl", lambda text: b"epoch 1\n" + text),
        r"Line 1 of run/metrics\.jsonl is no JSON object: .* Undo",
    ),
    resumed(
        "resumed without its checkpoints",
        lambda world: shutil.rmtree(world.path / "run/checkpoints"),
        "run is a run whose checkpoints are gone from run/checkpoints, .* Put them back",
    ),
    resumed(
        "resumed without its config.json",
        leave_checkpoints_alone,
        r"run holds checkpoints, but not the config\.json of the run",
    ),
    Row(
        "resumed after a pair was removed",
        resumed_without_a_pair,
        Refused(
            "run, which was trained on folder from own, does not fit the data of folder from "
            r"own\. Differing: fingerprint: .*counts\.train: 6 -> 5\. .*--accept-other-data",
            leaves="prepared",
        ),
    ),
    Row(
        "resumed with another model",
        lambda world: ["train.py", "--resume", "--model.width", 4, "--out", world.path / "run"],
        Refused("run was made with another configuration, .* Differing: model.width: 2 -> 4"),
    ),
    Row(
        "run begun where one is",
        lambda world: [
            "train.py",
            "--data.prepared-dir",
            world.path / "prepared",
            "--data.synthetic-train",
            8,
            "--data.synthetic-validation",
            8,
            "--out",
            world.path / "run",
        ],
        Refused("run already holds a complete run. Add --resume", leaves="prepared"),
    ),
    # Pictures to predict.
    predicted(
        "broken picture among good ones",
        lambda world: among_good(world, encoded(sound_picture("b"))[:60]),
        others_done(r"b\.png cannot be decoded"),
    ),
    predicted(
        "bomb among good pictures",
        lambda world: among_good(world, png(20_000, 20_000, 8, 2, b"")),
        others_done(r"b\.png is 20000 x 20000 = 400,000,000 pixels; the limit is 128,000,000"),
    ),
    predicted(
        "picture that is not there",
        lambda world: [*among_good(world, None), world.path / "gone/b.png"],
        others_done(r"gone/b\.png does not exist"),
    ),
    predicted(
        "folder without pictures",
        lambda world: [world.path / "run/checkpoints"],
        Refused("run/checkpoints holds no image to predict"),
    ),
    predicted(
        "two pictures of one name",
        lambda world: [
            world.path / "own/train/images",
            world.file("other/b.jpg", encoded(sound_picture("b"), "JPEG")),
        ],
        Refused(r"images/b\.png and .*other/b\.jpg would all be written to .*Rename them"),
    ),
]
