"""Damaged copies of sound files: each is read, or is a `DataError` or `RunError`; nothing else
comes out, and nothing hangs."""

import faulthandler
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from ground import World
from PIL import Image
from rows_pictures import saved, turned
from small_data import encoded, half_mask, picture

from jaxunet.data.images import read_image
from jaxunet.data.masks import read_mask
from jaxunet.errors import DataError, RunError
from jaxunet.runs import loading as trained

PICTURE, MASK = picture(1), half_mask()
PICTURES, CHECKPOINTS = 3000, 60
LIMIT_SECONDS = 20
"""For one file; then Python shows where it hangs and ends."""

IMAGES = [
    encoded(PICTURE),
    encoded(PICTURE[:, :, 0]),
    saved(Image.fromarray(PICTURE).convert("P")),
    turned(PICTURE),
    encoded(PICTURE, "JPEG"),
    saved(PICTURE, "JPEG", progressive=True),
    saved(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    saved(PICTURE, "TIFF", compression="tiff_lzw"),
    encoded(PICTURE, "BMP"),
    encoded(PICTURE, "GIF"),
    saved(PICTURE, "WEBP", lossless=True),
    encoded(PICTURE, "JPEG2000"),
]
MASKS = [
    encoded(MASK),
    saved(MASK > 0),
    saved(Image.fromarray(MASK).convert("P")),
    saved(MASK.astype(np.uint16)),
    encoded(MASK, "BMP"),
    saved(MASK, "TIFF", compression="tiff_lzw"),
]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    yield
    faulthandler.cancel_dump_traceback_later()


def damaged(contents: bytes, rng: np.random.Generator) -> bytes:
    """`contents` cut short, or with up to four bits flipped; headers are hit more often."""
    changed = bytearray(contents)
    if rng.random() < 0.3:
        return bytes(changed[: rng.integers(len(changed))])
    for _ in range(rng.integers(1, 5)):
        reach = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
        changed[rng.integers(reach)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def outcome(read: Callable[[], object]) -> str:
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    try:
        read()
    except (DataError, RunError):
        return "refused"
    return "read"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("reader", "read", "sound"),
    [
        ("images", read_image, IMAGES),
        ("masks", read_mask, MASKS),
        ("masks, binarized", functools.partial(read_mask, binarize=True), MASKS),
    ],
)
def test_damaged_pictures_are_read_or_refused(
    reader: str,
    read: Callable[[bytes], object],
    sound: list[bytes],
    record_property: Callable[[str, object], None],
) -> None:
    rng = np.random.default_rng(0)
    found = {"read": 0, "refused": 0}
    for number in range(PICTURES):
        contents = damaged(sound[number % len(sound)], rng)
        found[outcome(functools.partial(read, contents))] += 1
    assert found["read"] > 0
    assert found["refused"] > 0
    record_property("reader", reader)
    record_property("fuzzed", found)


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints_are_read_whole_or_refused(
    world: World, record_property: Callable[[str, object], None], capfd: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    run = world.path / "run"
    sound = jax.tree.leaves(trained.load(run).variables)
    files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    found = {"read": 0, "refused": 0}
    record_property("reader", "checkpoints")

    def load() -> None:
        for leaf, expected in zip(
            jax.tree.leaves(trained.load(run).variables), sound, strict=True
        ):
            np.testing.assert_array_equal(leaf, expected)

    for number in range(CHECKPOINTS):
        path: Path = files[number % len(files)]
        contents = path.read_bytes()
        path.write_bytes(damaged(contents, rng))
        found[outcome(load)] += 1
        path.write_bytes(contents)
    assert found["refused"] > 0
    load()
    record_property("fuzzed", found)
