"""What the table of bad inputs stands on: a sound world to break, and a script run in it."""

import contextlib
import io
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from pytorch_designs import ReferenceUNet
from small_data import encoded, half_mask, isic_files, picture, write_files, write_zip

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.interop.weight_files import save_weights
from jaxunet.runs.training import train

SCRIPTS = Path(__file__).parents[2] / "experiments"
SIDE = 16
"""Side of the pictures in pixels; they are stored at it too, so that no pixel is resampled."""


@dataclass(frozen=True)
class World:
    """A folder in which all is well, until a row of the table breaks something.

    own/        a dataset of the user's own: six pairs, a to f, to train on, and two, y and z
    isic/       the challenge's zips of three training and two validation pairs
    prepared/   both, prepared
    run/        a run of one epoch on own/
    weights.pth, weights.safetensors
                weights of the reference design
    """

    path: Path

    def file(self, name: str, contents: bytes | str | None) -> Path:
        """Replace a file; None takes it away."""
        path = self.path / name
        if contents is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        return path

    def pair(self, image: bytes, mask: bytes, *, suffix: str = ".png") -> None:
        """Replace training pair b, whose image is then called b`suffix`."""
        self.file("own/train/images/b.png", None)
        self.file(f"own/train/images/b{suffix}", image)
        self.file("own/train/masks/b.png", mask)

    def forget_prepared(self) -> None:
        """For damage that a prepared dataset, which is sound, would rightly not notice."""
        shutil.rmtree(self.path / "prepared")

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        path = self.path / name
        path.write_bytes(change(path.read_bytes()))

    def glob(self, pattern: str) -> str:
        """Name of the one file that matches."""
        [path] = self.path.glob(pattern)
        return str(path.relative_to(self.path))

    def prepared(self, name: Any, **changes: Any) -> DataConfig:
        """Configuration of the dataset `name` as `command` prepares it."""
        return DataConfig(
            name=name,
            dir=self.path / name.replace("folder", "own").replace("2018", ""),
            prepared_dir=self.path / "prepared",
            image_size=SIDE,
            stored_size=SIDE,
            **changes,
        )

    def prepare_command(self, name: str, *words: object) -> list[object]:
        config = self.prepared(name)
        return [
            *("prepare_data.py", name, "--data.dir", config.dir),
            *("--data.prepared-dir", config.prepared_dir),
            *("--data.image-size", SIDE, "--data.stored-size", SIDE, *words),
        ]

    def example(self, key: str, **changes: object) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask as they were stored for a pair of own/."""
        prepared = prepare(self.prepared("folder", **changes), progress=False)
        for split in prepared.counts:
            for example in prepared.source(split):
                if example["id"] == key:
                    return example["image"], example["mask"][:, :, 0]
        raise KeyError(key)

    def snapshot(self) -> dict[str, bytes]:
        """Contents of every file, by name."""
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in self.path.rglob("*")
            if path.is_file()
        }


def sound_picture(key: str) -> np.ndarray:
    """The picture of the pair `key` of own/."""
    return picture(ord(key), SIDE, SIDE) & 0xF0


def make_world(path: Path) -> World:
    """A sound world in the empty folder `path`."""
    world = World(path)
    for split, keys in {"train": "abcdef", "validation": "yz"}.items():
        for key in keys:
            image = encoded(sound_picture(key))
            write_files(path / "own" / split / "images", {f"{key}.png": image})
            mask = encoded(half_mask(SIDE, SIDE))
            write_files(path / "own" / split / "masks", {f"{key}.png": mask})
    (path / "isic").mkdir()
    for part, ids in {"Training": [3, 7, 12], "Validation": [20, 21]}.items():
        images, masks = isic_files(ids)
        write_zip(path / "isic" / f"ISIC2018_Task1-2_{part}_Input.zip", images)
        write_zip(path / "isic" / f"ISIC2018_Task1_{part}_GroundTruth.zip", masks)
    prepare(world.prepared("isic2018"), progress=False)
    config = Config(
        data=world.prepared("folder"),
        model=ModelConfig(width=2, depth=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(epochs=1, batch_size=8, eval_batch_size=8),
    )
    train(config, prepare(config.data, progress=False), path / "run", show_progress=False)
    design = ReferenceUNet(2, depth=2)
    state = {name: value.numpy() for name, value in design.state_dict().items()}
    save_weights(path / "weights.pth", state)
    save_weights(path / "weights.safetensors", state)
    return world


def copy_world(world: World, path: Path) -> World:
    """The same, elsewhere: its run's configuration speaks of the data there."""
    shutil.copytree(world.path, path, dirs_exist_ok=True)
    copy = World(path)
    copy.edit(
        "run/config.json", lambda t: t.replace(str(world.path).encode(), str(path).encode())
    )
    return copy


def run(words: list[object]) -> tuple[int, str]:
    """Exit status and output of a script, run as `python experiments/...` runs it but in
    this process, where starting costs nothing; an exception that it lets out comes out."""
    script = SCRIPTS / str(words[0])
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(script), *map(str, words[1:])]),
        mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]),
        mock.patch.dict(os.environ, COLUMNS="200"),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), _without_bars(output.getvalue())
    raise AssertionError(f"{script} did not end through run_script")


def _without_bars(output: str) -> str:
    """What stays on a terminal, where a progress bar is written over, and tyro's frames."""
    lines = [line.rsplit("\r", 1)[-1] for line in output.splitlines()]
    return re.sub(r"[│╭╮╰╯─]+", " ", "\n".join(lines))
