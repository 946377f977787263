import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from small_data import (
    datasets,
    encoded,
    half_mask,
    isic_files,
    picture,
    quiet,
    write_files,
    write_zip,
)

from jaxunet.config import DataConfig
from jaxunet.data import prepare
from jaxunet.data.duplicates import Looks, alike, fingerprint, warning
from jaxunet.data.images import read_reduced_image
from jaxunet.errors import DataError


def test_all_problems_are_listed_together_and_nothing_is_left(isic: DataConfig) -> None:
    assert isic.dir is not None
    images, masks = isic_files([3, 7, 12])
    images["ISIC_0000003.jpg"] = images["ISIC_0000003.jpg"][:300]
    masks["ISIC_0000007_segmentation.png"] = encoded(half_mask() // 2)
    images["stray.heic"] = b""
    write_zip(isic.dir / "ISIC2018_Task1-2_Training_Input.zip", images)
    write_zip(isic.dir / "ISIC2018_Task1_Training_GroundTruth.zip", masks)
    images, masks = isic_files([20, 21])
    del masks["ISIC_0000020_segmentation.png"]
    masks["ISIC_0000021_segmentation.png"] = encoded(half_mask(8, 8))
    write_zip(isic.dir / "ISIC2018_Task1-2_Validation_Input.zip", images)
    write_zip(isic.dir / "ISIC2018_Task1_Validation_GroundTruth.zip", masks)
    with pytest.raises(DataError) as error:
        quiet(isic)
    heading, *lines = str(error.value).splitlines()
    assert heading.startswith("5 problems found")
    for name, reason in {
        "stray.heic": "is HEIC, which is not read",
        "ISIC_0000020.jpg": "has no mask",
        "ISIC_0000003.jpg": "cannot be decoded",
        "ISIC_0000007_segmentation.png": "holds the values 0, 127",
        "ISIC_0000021_segmentation.png": "is 8 x 8 pixels",
    }.items():
        assert sum(name in line and reason in line for line in lines) == 1, name
    assert datasets(isic) == []


def test_one_damaged_image_late_in_the_data_leaves_nothing(own: DataConfig) -> None:
    assert own.dir is not None
    good = quiet(own)
    test_id = good.ids("test")[-1]
    (own.dir / "images" / f"{test_id}.png").write_bytes(encoded(picture(0))[:1000])
    with pytest.raises(DataError, match="1 problem found"):
        quiet(own)
    assert datasets(own) == [good.directory]


def test_an_id_in_two_splits_is_a_problem(isic: DataConfig) -> None:
    assert isic.dir is not None
    images, masks = isic_files([3])
    write_zip(isic.dir / "ISIC2018_Task1-2_Validation_Input.zip", images)
    write_zip(isic.dir / "ISIC2018_Task1_Validation_GroundTruth.zip", masks)
    with pytest.raises(DataError, match="split 'train'; splits must not share"):
        quiet(isic)


def skin(seed: int) -> Image.Image:
    """A picture as smooth as a lesion on skin, of its own kind for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((240, 180), Image.Resampling.BICUBIC)


def test_pictures_that_look_the_same_in_different_splits_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brighter = np.clip(np.asarray(skin(1)) * 0.8 + 30, 0, 255).astype(np.uint8)
    pictures = {
        "train": {"a": skin(0), "b": skin(1), "c": skin(2), "c-again": skin(2)},
        "val": {"d": skin(0).resize((111, 90)), "e": skin(3)},
        "test": {"f": Image.fromarray(brighter), "g": skin(4)},
    }
    for split, each in pictures.items():
        for name, image in each.items():
            images, masks = (tmp_path / "own" / split / kind for kind in ("images", "masks"))
            images.mkdir(parents=True, exist_ok=True)
            masks.mkdir(exist_ok=True)
            quality = 40 + 7 * len(list(images.iterdir()))
            image.save(images / f"{name}.jpg", quality=quality)
            Image.new("L", image.size, 255).save(masks / f"{name}.png")
    config = DataConfig(
        name="folder", dir=tmp_path / "own", prepared_dir=tmp_path / "prepared", stored_size=32
    )
    found = prepare(config)
    listed = found.directory / "near_duplicates.json"
    assert json.loads(listed.read_text()) == [
        ["train/a", "validation/d"],
        ["train/b", "test/f"],
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "warning: 2 pairs of pictures in different splits look the same: train/a and "
        "validation/d, train/b and test/f. Scores of what was trained on flatter" in said
    )
    assert str(listed) in said
    prepare(config)
    assert " ".join(capsys.readouterr().err.split()) in said  # by whoever opens them


def test_a_list_that_cannot_be_written_leaves_no_dataset_without_it(
    own: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Looks, "write", lambda self, folder: full(folder))
        with pytest.raises(DataError, match=r"cannot be written: .*No space left"):
            quiet(own)
    assert quiet(own).counts["train"] > 0


def test_what_is_not_the_datasets_fault_is_no_reason_to_delete_it(
    own: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = quiet(replace(own, stored_size="native"))
    with pytest.raises(
        DataError, match=r"the limit is 0\. .*raise --data\.max-megapixels"
    ) as told:
        replace(native, max_megapixels=0).source("train")[0]
    assert "Delete it" not in str(told.value)
    source = native.source("train")
    monkeypatch.setattr(source, "stored", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        source[0]


def test_of_many_near_duplicates_three_are_named() -> None:
    found = [(f"train/{n}", f"test/{n}") for n in range(1200)]
    said = warning(found, "LIST")
    assert "1,200 pairs" in said
    assert "train/2 and test/2, and 1,197 more." in said
    assert "1 pair of" in warning(found[:1], "LIST")


def test_different_lesions_do_not_look_the_same(real_data: Path) -> None:
    """Of 400 pictures; those that do are ISIC's own copies, by other cameras or colours."""
    images = sorted((real_data / "ISIC2018_Task1-2_Training_Input").glob("*.jpg"))[:400]
    bits = np.stack([fingerprint(read_reduced_image(path, 64)[0]) for path in images])
    assert alike(bits, bits) == [(i, i) for i in range(len(images))]


def test_a_prepared_dataset_is_opened_without_reading_the_images(own: DataConfig) -> None:
    first = quiet(own)
    with mock.patch("jaxunet.data.prepare.check_pair", side_effect=AssertionError):
        assert quiet(own) == first


def test_changed_source_data_are_prepared_anew(own: DataConfig) -> None:
    first = quiet(own)
    assert own.dir is not None
    write_files(own.dir / "masks", {"case00_mask.png": encoded(255 - half_mask())})
    second = quiet(own)
    assert second.fingerprint != first.fingerprint
    assert len(datasets(own)) == 2


def test_pictures_edited_in_place_are_prepared_anew(own: DataConfig) -> None:
    """Of a format without compression, so that sizes stay; and with the time put back."""
    assert own.dir is not None
    for path in (own.dir / "images").iterdir():
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    first = quiet(own)
    for path in (own.dir / "images").iterdir():
        before = path.stat()
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    second = quiet(own)
    for old, new in zip(first.source("train"), second.source("train"), strict=True):
        # Resized and rounded, each for itself.
        assert np.abs(old["image"] + new["image"].astype(int) - 255).max() <= 1


def test_a_recorded_dataset_is_opened_where_its_source_is_gone(
    own: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own.dir is not None
    first = quiet(own)
    own.dir.rename(own.dir.with_name("moved"))
    with pytest.raises(DataError, match="own, which is not a folder"):
        quiet(own)
    with pytest.raises(DataError, match=r"Nor is there what was prepared .*0123456789ab"):
        prepare(own, recorded="0123456789ab")
    assert prepare(own, recorded=first.fingerprint) == first
    assert "own, which is not a folder. Going on with" in capsys.readouterr().err
    own.dir.mkdir()
    assert prepare(own, progress=False, recorded=first.fingerprint) == first


def test_a_recorded_dataset_of_an_earlier_version_is_opened_where_its_source_is_gone(
    own: DataConfig,
) -> None:
    assert own.dir is not None
    first = quiet(own)
    old = first.fingerprint[:8]
    # As it was called, inside and out, when fingerprints had eight digits.
    directory = first.directory.parents[1] / f"16-{old}" / first.directory.name
    shutil.move(first.directory.parent, directory.parent)
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace(first.fingerprint, old))
    anew = prepare(own, progress=False, recorded=old)
    assert anew.fingerprint == first.fingerprint
    shutil.rmtree(own.dir)
    opened = prepare(own, progress=False, recorded=old)
    assert (opened.fingerprint, opened.directory) == (old, directory)
    assert opened.ids("train") == anew.ids("train")


def test_zips_that_are_gone_are_not_missed_either(isic: DataConfig) -> None:
    assert isic.dir is not None
    first = quiet(isic)
    for path in isic.dir.iterdir():
        path.unlink()
    (isic.dir / "notes.txt").write_text("moved")
    assert prepare(isic, progress=False, recorded=first.fingerprint) == first
    # Half of a split is not a source that is gone.
    (isic.dir / "ISIC2018_Task1-2_Training_Input.zip.part").write_bytes(b"")
    with pytest.raises(DataError, match="No split of isic2018 is complete"):
        prepare(isic, progress=False, recorded=first.fingerprint)


def test_a_prepared_dataset_that_names_another_class_imports_nothing(
    own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = quiet(own).directory / "features.json"
    sound = path.read_text()
    text = "tensorflow_datasets.core.features.text_feature.Text"
    nested = json.dumps({"json": json.dumps({"type": "evil_module.Text", "content": {}})})
    for features in (
        sound.replace(text, "evil_module.Text"),
        json.dumps({"type": "evil_module.Text", "content": {}}),
        sound.replace('"text": {}', f'"jsonFeature": {nested}'),
    ):
        assert features != sound
        path.write_text(features)
        with pytest.raises(DataError, match=r"features\.json names .*evil_module"):
            quiet(own)
    assert not (tmp_path / "ran").exists()


def test_an_interrupted_or_killed_prepare_is_cleared_up(own: DataConfig) -> None:
    with (
        mock.patch("jaxunet.data.prepare.check_pair", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        quiet(own)
    assert datasets(own) == []
    prepared = quiet(own)
    # What a killed process leaves behind: TFDS's temporary folder.
    prepared.directory.rename(prepared.directory.with_name("incomplete.ABCDEF_1.1.0"))
    assert quiet(own) == prepared
    assert datasets(own) == [prepared.directory]


def test_two_processes_may_prepare_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from jaxunet.config import DataConfig;"
        "from jaxunet.data import prepare;"
        "config = DataConfig(prepared_dir=Path(sys.argv[1]), image_size=64);"
        "print(len(prepare(config, progress=False).source('train')));"
        "print(*{'tensorflow', 'torch', 'jax'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=60)
        # Nothing else is printed, and no framework is imported on the way.
        assert (output, errors) == ("384\n\n", "")
    assert len(list(tmp_path.glob("*/*/*1.1.0"))) == 1


def test_a_damaged_dataset_is_noticed(own: DataConfig) -> None:
    prepared = quiet(own)
    shard = next(prepared.directory.glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match="is damaged"):
        quiet(own)


@pytest.mark.parametrize(
    ("place", "variable"), [(None, None), (None, "~/data"), (Path("~/data"), "/elsewhere")]
)
def test_a_user_without_a_home_is_asked_where_to_prepare_before_anything_is_done(
    place, variable, tmp_path, monkeypatch
):
    """TFDS would make a folder called `~` in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    if variable:
        monkeypatch.setenv("TFDS_DATA_DIR", variable)
    config = DataConfig(synthetic_train=1, image_size=16, prepared_dir=place)
    with (
        mock.patch("pwd.getpwuid", side_effect=KeyError),
        pytest.raises(DataError, match=r"below ~\S*, but no .*--data.prepared-dir .*TFDS_DATA"),
    ):
        prepare(config, progress=False)
    assert not list(tmp_path.iterdir())
