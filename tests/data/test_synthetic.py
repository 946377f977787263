from pathlib import Path

import numpy as np
import pytest

from jaxunet.config import DataConfig
from jaxunet.data import prepare
from jaxunet.data.drawing import SPLITS, draw


def config(tmp_path: Path, **changes: object) -> DataConfig:
    choices: dict = {
        "prepared_dir": tmp_path,
        "image_size": 32,
        "synthetic_train": 4,
        "synthetic_validation": 2,
    }
    return DataConfig(**(choices | changes))


def test_one_seed_gives_one_picture_and_another_seed_another() -> None:
    image, mask = draw(0, "train", 5, 64)
    again, mask_again = draw(0, "train", 5, 64)
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)
    for other in ((1, "train", 5), (0, "validation", 5), (0, "train", 6)):
        assert not np.array_equal(image, draw(*other, 64)[0])


def test_pictures_are_credible_arrays() -> None:
    for index in range(30):
        image, mask = draw(3, "test", index, 48)
        assert image.shape == (48, 48, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert mask.shape == (48, 48, 1)
        assert set(np.unique(mask)) == {0, 255}, f"picture {index} has no lesion, or no skin"


def test_lesions_are_mostly_darker_than_skin_but_not_told_by_darkness_alone() -> None:
    darker, scores = [], []
    for index in range(40):
        image, mask = draw(0, "train", index, 64)
        lesion, grey = mask[:, :, 0] > 0, image.mean(axis=2)
        darker.append(grey[lesion].mean() < grey[~lesion].mean() + 5)
        predicted = grey < (np.percentile(grey, 2) + np.percentile(grey, 98)) / 2
        both = 2 * np.logical_and(lesion, predicted).sum()
        scores.append(both / (lesion.sum() + predicted.sum()))
    assert np.mean(darker) > 0.8
    assert 0.2 < np.mean(scores) < 0.85


def test_size_changes_the_picture_only_in_detail() -> None:
    _, small = draw(0, "train", 1, 64)
    _, large = draw(0, "train", 1, 128)
    assert np.mean(small != large[::2, ::2]) < 0.03


def test_prepared_pictures_are_the_drawn_ones_whatever_their_number(tmp_path: Path) -> None:
    few, more = (
        prepare(config(tmp_path, synthetic_train=count), progress=False) for count in (2, 5)
    )
    assert few.directory != more.directory
    assert (few.counts, more.counts) == (
        {"train": 2, "validation": 2, "test": 2},
        {"train": 5, "validation": 2, "test": 2},
    )
    for split in SPLITS:
        for index, example in enumerate(few.source(split)):
            image, mask = draw(0, split, index, 32)
            assert np.array_equal(example["image"], image)
            assert np.array_equal(example["mask"], mask)
            assert np.array_equal(more.source(split)[index]["image"], image)


@pytest.mark.parametrize("change", [{"synthetic_seed": 1}, {"image_size": 48}])
def test_another_seed_or_size_is_another_dataset(tmp_path: Path, change: dict) -> None:
    first = prepare(config(tmp_path), progress=False)
    second = prepare(config(tmp_path, **change), progress=False)
    assert first.directory != second.directory
    assert second.source("train")[0]["image"].shape[0] == change.get("image_size", 32)
