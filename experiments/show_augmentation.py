"""What training makes of pictures: `show_augmentation.py [PRESET] --train.augment strong`."""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import jax
import jax.numpy as jnp
import numpy as np
from command_line import parse, preset, run_script, take_preset
from presets import PRESETS
from scipy import ndimage

from jaxunet.config import IGNORED, DataConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.data.images import encode_png
from jaxunet.data.reader import BatchReader, HostBatch
from jaxunet.data.sampler import BatchSampler
from jaxunet.files import check_writable, write_atomically
from jaxunet.learning.augment import augment, example_keys, seed_key
from jaxunet.ranges import require_at_least

OUTLINE = (240, 228, 66)
GAP = 4
"""Pixels between two pictures."""


@dataclass(frozen=True)
class Arguments:
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    split: str | None = None
    """Split to show pictures of (none: data.train-split)."""
    pictures: int = 6
    """How many, a row each."""
    draws: int = 7
    """How often each is varied, a column each beside the picture as it is."""
    out: Path = Path("augmentation.png")
    """PNG file to write."""

    def __post_init__(self) -> None:
        require_at_least("--pictures", self.pictures, 1)
        require_at_least("--draws", self.draws, 1)


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with the innermost pixels of the mask's border in a colour.

    Pixels that don't count are grey.
    """
    ignored = mask[..., 0] == IGNORED
    lesion = (mask[..., 0] > 0) & ~ignored
    image = np.where(ignored[..., None], np.uint8(128), image)
    border = lesion & ~ndimage.binary_erosion(lesion, border_value=1)
    return np.where(border[..., None], np.array(OUTLINE, np.uint8), image)


def grid(train: TrainConfig, batch: HostBatch, draws: int) -> np.ndarray:
    """A row for each picture of the batch: as it is, and as it is at the first steps.

    Returns:
        uint8 [height, width, 3].
    """
    vary = jax.jit(
        partial(augment, train.augmentation.ranges(train.augment)), static_argnames="ignores"
    )
    images, masks, real = batch["image"], batch["mask"], batch["weight"] > 0
    ignores = bool((masks == IGNORED).any())
    columns = [(images, masks)]
    for step in range(draws):
        keys = example_keys(seed_key(train.seed), jnp.int32(step), jnp.arange(len(images)))
        columns.append(jax.device_get(vary(keys, images, masks, real, ignores=ignores)))
    shown = [[outlined(*pair) for pair in zip(*each, strict=True)] for each in columns]
    tiles = np.stack(shown, axis=1)[real]
    border = ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0))
    sheet = np.pad(tiles, border, constant_values=255)
    rows, across, height, width, _ = sheet.shape
    return sheet.swapaxes(1, 2).reshape(rows * height, across * width, 3)[:-GAP, :-GAP]


def main() -> None:
    name, rest = take_preset(sys.argv[1:])
    start = preset(name or "demo")
    # Presets flip, if anything.
    default = Arguments(start.data, replace(start.train, augment="standard"))
    described = f"Show augmentation. PRESET is one of {', '.join(PRESETS)} (none: demo)."
    arguments = parse(Arguments, described, default, rest)
    check_writable(arguments.out.parent, "--out")
    config, train = arguments.data, arguments.train
    source = prepare(config).source(arguments.split or config.train_split)
    order = BatchSampler(len(source), arguments.pictures, train.seed)
    batch = BatchReader(source, order, config.image_size)(0)
    write_atomically(arguments.out, encode_png(grid(train, batch, arguments.draws)))
    print(f"Written: {arguments.out}")


if __name__ == "__main__":
    run_script(main)
