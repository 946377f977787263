import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
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
from jaxunet.errors import DataError


def test_all_problems_are_listed_together_and_nothing_is_left(isic: DataConfig) -> None:
    assert isic.dir is not None
    images, masks = isic_files([3, 7, 12])
    images["ISIC_0000003.jpg"] = images["ISIC_0000003.jpg"][:300]
    masks["ISIC_0000007_segmentation.png"] = encoded(half_mask() // 2)
    images["stray.docx"] = b""
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
        "stray.docx": "is not an image",
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
