from pathlib import Path

import pytest
from small_data import encoded, half_mask, isic_files, picture, write_files, write_zip

from jaxunet.config import DataConfig


@pytest.fixture
def isic(tmp_path: Path) -> DataConfig:
    """Zips of three training and two validation pairs, no test split."""
    root = tmp_path / "isic"
    root.mkdir()
    for part, ids in {"Training": [12, 3, 7], "Validation": [20, 21]}.items():
        images, masks = isic_files(ids)
        extra = {"LICENSE.txt": b"CC", "ATTRIBUTION.txt": b"ISIC"}
        superpixels = {"ISIC_0000003_superpixels.png": encoded(picture(0))}
        write_zip(root / f"ISIC2018_Task1-2_{part}_Input.zip", images | extra | superpixels)
        write_zip(root / f"ISIC2018_Task1_{part}_GroundTruth.zip", masks | extra)
    return DataConfig(
        name="isic2018", dir=root, prepared_dir=tmp_path / "prepared", stored_size=16
    )


@pytest.fixture
def own(tmp_path: Path) -> DataConfig:
    """Twenty pairs in images/ and masks/."""
    names = [f"case{i:02d}" for i in range(20)]
    root = tmp_path / "own"
    write_files(root / "images", {f"{n}.png": encoded(picture(i)) for i, n in enumerate(names)})
    write_files(root / "masks", {f"{n}_mask.png": encoded(half_mask()) for n in names})
    return DataConfig(
        name="folder", dir=root, prepared_dir=tmp_path / "prepared", stored_size=16
    )
