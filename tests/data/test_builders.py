import dataclasses
import io
import itertools
import json
import pickle
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from small_data import encoded, half_mask, picture, quiet, write_files

from jaxunet.config import DataConfig
from jaxunet.data import prepare
from jaxunet.errors import DataError


def test_zips_are_prepared_in_order_of_ids_and_resized_as_pillow_does(isic: DataConfig) -> None:
    prepared = quiet(isic)
    assert prepared.counts == {"train": 3, "validation": 2}
    assert prepared.official_count("train") == 2594
    ids = ["ISIC_0000003", "ISIC_0000007", "ISIC_0000012"]
    assert prepared.ids("train") == ids
    source = prepared.source("train")
    assert len(source) == 3
    assert [example["id"] for example in source] == ids
    image = Image.open(io.BytesIO(encoded(picture(7), "JPEG")))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(source[1]["image"], expected)
    expected_mask = np.zeros((16, 16), np.uint8)
    expected_mask[:, :8] = 255
    assert np.array_equal(source[1]["mask"][:, :, 0], expected_mask)


def test_unpacked_folders_give_the_same_examples_as_zips(
    isic: DataConfig, tmp_path: Path
) -> None:
    unpacked = tmp_path / "unpacked"
    assert isic.dir is not None
    for path in isic.dir.glob("*.zip"):
        zipfile.ZipFile(path).extractall(unpacked)
    from_zips = quiet(isic)
    from_folders = quiet(isic, dir=unpacked, prepared_dir=tmp_path / "other")
    assert from_folders.counts == from_zips.counts
    assert from_folders.fingerprint == from_zips.fingerprint
    for split in ("train", "validation"):
        for a, b in zip(from_zips.source(split), from_folders.source(split), strict=True):
            assert a["id"] == b["id"]
            assert np.array_equal(a["image"], b["image"])
            assert np.array_equal(a["mask"], b["mask"])


def test_native_keeps_the_original_file_and_size(isic: DataConfig) -> None:
    source = quiet(isic, stored_size="native").source("validation")
    original = encoded(picture(20), "JPEG")
    assert source.stored(0)["image"] == original
    assert np.array_equal(source[0]["image"], np.asarray(Image.open(io.BytesIO(original))))
    assert np.array_equal(source[0]["mask"][:, :, 0], half_mask())


def test_an_absent_split_says_which_files_it_needs(isic: DataConfig) -> None:
    prepared = quiet(isic)
    with pytest.raises(DataError, match="ISIC2018_Task1-2_Test_Input and ISIC2018_Task1_Test_"):
        prepared.source("test")
    with pytest.raises(DataError, match="ISIC2018_Task1-2_Test_Input"):
        prepared.count("test[:50%]")
    with pytest.raises(DataError, match="Known splits: train, validation, test"):
        prepared.source("training")


def test_no_complete_split_is_an_error_that_names_the_files(isic: DataConfig) -> None:
    assert isic.dir is not None
    for path in isic.dir.glob("*GroundTruth.zip"):
        path.unlink()
    with pytest.raises(DataError, match="ISIC2018_Task1_Training_GroundTruth"):
        quiet(isic)


def test_slices_follow_tfds(own: DataConfig) -> None:
    prepared = quiet(own)
    whole = prepared.ids("train")
    assert len(whole) == prepared.count("train") == 16
    assert prepared.ids("train[:25%]") == whole[:4]
    assert [e["id"] for e in prepared.source("train[4:6]+test")] == [
        *whole[4:6],
        *prepared.ids("test"),
    ]
    assert prepared.shared("train[:6]", "train[4:]+test") == 2
    assert prepared.shared("train", "test") == 0
    for malformed in ("train[:0]", "train[a:b]", "train[0:5"):
        with pytest.raises(DataError, match="Split"):
            prepared.source(malformed)


def test_a_source_can_be_pickled_and_ends(own: DataConfig) -> None:
    source = quiet(own).source("test")
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy[1]["image"], source[1]["image"])
    assert source[-1]["id"] == source[len(source) - 1]["id"]
    with pytest.raises(IndexError):
        source[len(source)]


@pytest.mark.parametrize(
    ("split", "counts"), [("hash", (16, 1, 3)), ("permutation", (16, 2, 2))]
)
def test_a_folder_is_split_by_seed_and_the_ids_are_written_down(
    own: DataConfig, split: str, counts: tuple[int, int, int]
) -> None:
    own = dataclasses.replace(own, folder_split=split)
    prepared = quiet(own)
    assert tuple(prepared.counts.values()) == counts
    assert prepared.official_count("train") is None
    written = json.loads((prepared.directory / "split_ids.json").read_text())
    for split, ids in written.items():
        assert ids == sorted(ids) == [example["id"] for example in prepared.source(split)]
    assert sorted(itertools.chain(*written.values())) == [f"case{i:02d}" for i in range(20)]
    other = quiet(own, folder_split_seed=1)
    assert other.directory != prepared.directory
    assert other.ids("test") != prepared.ids("test")


def test_a_folder_with_split_folders_keeps_them(own: DataConfig, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    for split, names in {"train": ["a", "b"], "validation": ["c"]}.items():
        write_files(
            root / split / "images", {f"{n}.png": encoded(picture(ord(n))) for n in names}
        )
        write_files(root / split / "masks", {f"{n}.png": encoded(half_mask()) for n in names})
    prepared = quiet(own, dir=root)
    assert {split: prepared.ids(split) for split in prepared.counts} == {
        "train": ["a", "b"],
        "validation": ["c"],
    }
    with pytest.raises(DataError, match="test needs test/images and test/masks"):
        prepared.source("test")
    (root / "images").mkdir()
    with pytest.raises(DataError, match="both"):
        quiet(own, dir=root)


def test_binarize_accepts_other_mask_values(own: DataConfig) -> None:
    assert own.dir is not None
    strict = quiet(own)
    for number, kind in enumerate(["1", "L", "RGB", "RGBA"]):
        mask = Image.fromarray(half_mask() if kind in ("1", "RGBA") else half_mask() // 255)
        write_files(
            own.dir / "masks",
            {f"case{number:02d}_mask.png": encoded(np.array(mask.convert(kind)))},
        )
    with pytest.raises(DataError, match="3 problems found"):
        quiet(own)
    prepared = quiet(own, binarize=True)
    assert prepared.ids("train") == strict.ids("train")
    for split in prepared.counts:
        for found, expected in zip(prepared.source(split), strict.source(split), strict=True):
            assert np.array_equal(found["mask"], expected["mask"])


def test_many_shards_keep_the_order(own: DataConfig) -> None:
    with mock.patch("jaxunet.data.builder.SHARD_BYTES", 5 * 4 * 16 * 16):
        prepared = quiet(own)
    assert len(list(prepared.directory.glob("*train*"))) == 4
    ids = prepared.ids("train")
    assert ids == sorted(ids) == [example["id"] for example in prepared.source("train")]
    assert prepared.ids("train[4:11]") == ids[4:11]


@pytest.mark.parametrize("side", [256, 64])
def test_real_pairs_are_prepared(side: int, tmp_path: Path, real_data: Path) -> None:
    root = tmp_path / "real"
    images, masks = "ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"
    for name in (images, masks):
        (root / name).mkdir(parents=True)
        for path in sorted((real_data / name).iterdir())[:4]:
            (root / name / path.name).symlink_to(path)
    config = DataConfig(name="isic2018", dir=root, prepared_dir=tmp_path, stored_size=side)
    prepared = prepare(config, progress=False)
    assert prepared.counts == {"validation": 4}
    for example in prepared.source("validation"):
        with Image.open(root / images / f"{example['id']}.jpg") as image:
            expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
        difference = np.abs(example["image"].astype(int) - expected)
        # From 512 px a JPEG is decoded at a quarter of its size for 64, whole for 256.
        assert difference.max() <= (0 if side == 256 else 8)
        assert difference.mean() < 0.5
        with Image.open(root / masks / f"{example['id']}_segmentation.png") as mask:
            expected = np.asarray(mask.resize((side, side), Image.Resampling.NEAREST))
        assert np.array_equal(example["mask"][:, :, 0], expected)
