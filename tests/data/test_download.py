import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest
from small_data import (
    datasets,
    isic_files,
    quiet,
    served,
    write_zip,
)

from jaxunet.config import DataConfig
from jaxunet.data.isic2018 import Isic2018
from jaxunet.errors import DataError


@pytest.fixture
def download(isic: DataConfig) -> Iterator[DataConfig]:
    """The zips behind a web server, test split too."""
    root = isic.dir
    assert root is not None
    images, masks = isic_files([30])
    write_zip(root / "ISIC2018_Task1-2_Test_Input.zip", images)
    write_zip(root / "ISIC2018_Task1_Test_GroundTruth.zip", masks)
    with served(root):
        yield dataclasses.replace(isic, dir=None)


def test_downloads_are_registered_with_size_and_checksum() -> None:
    infos = {url.rsplit("/", 1)[1]: info for url, info in Isic2018.url_infos.items()}
    assert len(infos) == 6
    training = infos["ISIC2018_Task1-2_Training_Input.zip"]
    assert training.size == 11_165_358_566
    assert training.checksum.startswith("80f98572347a2d7a")


def test_without_a_folder_the_zips_are_downloaded_once(download: DataConfig) -> None:
    prepared = quiet(download)
    assert prepared.counts == {"train": 3, "validation": 2, "test": 1}
    assert prepared.ids("test") == ["ISIC_0000030"]
    with mock.patch("jaxunet.data.isic2018.URL", "http://127.0.0.1:9/"):
        assert quiet(download) == prepared


def test_a_download_with_another_checksum_is_refused(download: DataConfig) -> None:
    name = "ISIC2018_Task1_Test_GroundTruth.zip"
    [url] = [url for url in Isic2018.url_infos if url.endswith(name)]
    Isic2018.url_infos[url] = dataclasses.replace(Isic2018.url_infos[url], checksum="0" * 64)
    with pytest.raises(DataError, match=rf"(?s){name}.*wrong checksum.*--data\.dir"):
        quiet(download)
    assert datasets(download) == []
