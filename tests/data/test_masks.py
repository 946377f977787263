"""Masks with pixels that don't count, from the file to the batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import encoded, half_mask, picture, quiet, write_files

from jaxunet.config import IGNORED, DataConfig
from jaxunet.data.locate import locate
from jaxunet.data.masks import read_mask
from jaxunet.data.reader import BatchReader
from jaxunet.data.sampler import BatchSampler
from jaxunet.errors import ConfigError, DataError

CODES = np.random.default_rng(0).choice([0, IGNORED, 255], (30, 40)).astype(np.uint8)


def in_file(background: int, ignored: int, lesion: int, dtype: type = np.uint8) -> np.ndarray:
    """A file's values for `CODES`."""
    found = np.full(CODES.shape, background, dtype)
    found[CODES == IGNORED], found[CODES == 255] = ignored, lesion
    return found


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (in_file(0, 128, 255), {"ignore_value": 128}),
        (in_file(0, 1, 255), {"ignore_value": 1}),
        (in_file(0, 254, 255, np.uint16), {"ignore_value": 254}),
        (in_file(0, 255, 1), {"ignore_value": 255, "binarize": True}),  # as in Pascal VOC
        (in_file(0, 7, 65_535, np.uint16), {"ignore_value": 7, "binarize": True}),
    ],
)
def test_an_ignored_value_becomes_the_one_code(values: np.ndarray, options: dict) -> None:
    assert np.array_equal(read_mask(encoded(values), **options)[:, :, 0], CODES)
    # Where the file has none, all is as without.
    plain = np.where(values == options["ignore_value"], 0, values)
    found = read_mask(encoded(plain), **options)[:, :, 0]
    assert np.array_equal(found, np.where(CODES == IGNORED, 0, CODES))


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (in_file(0, 128, 255), {}, "name by --data.ignore-value which of them marks"),
        (in_file(0, 128, 255), {"ignore_value": 127}, "0, 128, 255, .* and 127 where"),
        (in_file(0, 128, 1), {"ignore_value": 128}, "Pass --data.binarize to take 1 as lesion"),
        (
            np.array([[0, 30, 128, 255]], np.uint8),
            {"ignore_value": 128, "binarize": True},
            "Of several greys one may be 128 by chance",
        ),
    ],
)
def test_masks_that_leave_open_what_counts_are_refused(
    values: np.ndarray, options: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_mask(encoded(values), **options)


@pytest.mark.parametrize("value", [-1, 0, 255, 256])
def test_a_value_that_says_what_lesion_or_background_is_is_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.ignore_value is {value}, but must be from"):
        DataConfig(name="folder", dir=Path("own"), ignore_value=value)


@pytest.mark.parametrize("name", ["synthetic", "isic2018"])
def test_masks_that_are_made_or_downloaded_hold_none(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.ignore_value is 9, .* in data\.dir\.$"):
        DataConfig(name=name, ignore_value=9)


def test_what_does_not_count_is_prepared_and_read_as_it_is(own: DataConfig) -> None:
    assert own.dir is not None
    name = "case03_mask.png"
    before = locate(own)[1]
    write_files(own.dir / "masks", {name: encoded(in_file(0, 99, 255))})
    with pytest.raises(DataError, match="ignore-value"):
        quiet(own)
    config = replace(own, ignore_value=99, image_size=8)
    prepared = quiet(config)
    small = Image.fromarray(CODES)
    for side in (16, 8):
        small = small.resize((side, side), Image.Resampling.NEAREST)
        found = []
        for split in prepared.counts:
            source = prepared.source(split)
            reader = BatchReader(source, BatchSampler(len(source), len(source)), side)
            found += [m for m in reader(0)["mask"] if IGNORED in m]
        assert len(found) == 1
        assert np.array_equal(found[0][:, :, 0], np.asarray(small))
    # Another value is another dataset, and none is the one of before.
    fingerprints = {locate(replace(own, ignore_value=v))[1] for v in (None, 98, 99)}
    assert len(fingerprints) == 3
    assert prepared.fingerprint in fingerprints
    write_files(own.dir / "masks", {name: encoded(half_mask())})
    assert locate(own)[1] == before


def test_a_mask_of_which_nothing_counts_is_refused(own: DataConfig) -> None:
    assert own.dir is not None
    config = replace(own, ignore_value=99)
    write_files(own.dir / "masks", {"case03_mask.png": encoded(0 * half_mask() + 99)})
    with pytest.raises(DataError, match=r"(?s)case03_mask\.png holds nothing but 99"):
        quiet(config)
    almost = 0 * half_mask() + 99
    almost[0, 1] = 255
    write_files(own.dir / "masks", {"case03_mask.png": encoded(almost)})
    message = r"(?s)case03_mask\.png no pixel that counts is left at 4 x 4"
    with pytest.raises(DataError, match=message):  # before anything is trained on
        quiet(replace(config, image_size=4, stored_size=4))


class OnePixelCounts:
    """A picture whose corner alone counts."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        mask = np.full((30, 40, 1), IGNORED, np.uint8)
        mask[0, 0] = 255
        return {"id": "a", "image": picture(0), "mask": mask}


def test_a_picture_of_which_nothing_that_counts_is_left_is_refused_by_name() -> None:
    order = BatchSampler(1, 1)
    assert BatchReader(OnePixelCounts(), order, 60)(0)["mask"][0, 0, 0] == 255
    with pytest.raises(DataError, match="the mask of a no pixel that counts is left at 4 x 4"):
        BatchReader(OnePixelCounts(), order, 4)(0)
