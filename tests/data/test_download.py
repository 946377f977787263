import dataclasses
import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
from small_data import (
    datasets,
    isic_files,
    quiet,
    write_zip,
)
from tensorflow_datasets.core.download.checksums import UrlInfo

from jaxunet.config import DataConfig
from jaxunet.data.isic2018 import Isic2018
from jaxunet.errors import DataError


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def served(isic: DataConfig) -> Iterator[DataConfig]:
    """The zips behind a web server, registered as the official ones are, test split too."""
    root = isic.dir
    assert root is not None
    images, masks = isic_files([30])
    write_zip(root / "ISIC2018_Task1-2_Test_Input.zip", images)
    write_zip(root / "ISIC2018_Task1_Test_GroundTruth.zip", masks)
    handler = functools.partial(Server, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        infos = {}
        for path in root.iterdir():
            contents = path.read_bytes()
            checksum = hashlib.sha256(contents).hexdigest()
            infos[address + path.name] = UrlInfo(len(contents), checksum, path.name)
        with (
            mock.patch("jaxunet.data.isic2018.URL", address),
            mock.patch.object(Isic2018, "url_infos", infos),
        ):
            yield dataclasses.replace(isic, dir=None)
        server.shutdown()


def test_downloads_are_registered_with_size_and_checksum() -> None:
    infos = {url.rsplit("/", 1)[1]: info for url, info in Isic2018.url_infos.items()}
    assert len(infos) == 6
    training = infos["ISIC2018_Task1-2_Training_Input.zip"]
    assert training.size == 11_165_358_566
    assert training.checksum.startswith("80f98572347a2d7a")


def test_without_a_folder_the_zips_are_downloaded_once(served: DataConfig) -> None:
    prepared = quiet(served)
    assert prepared.counts == {"train": 3, "validation": 2, "test": 1}
    assert prepared.ids("test") == ["ISIC_0000030"]
    with mock.patch("jaxunet.data.isic2018.URL", "http://127.0.0.1:9/"):
        assert quiet(served) == prepared


def test_a_download_with_another_checksum_is_refused(served: DataConfig) -> None:
    name = "ISIC2018_Task1_Test_GroundTruth.zip"
    [url] = [url for url in Isic2018.url_infos if url.endswith(name)]
    Isic2018.url_infos[url] = dataclasses.replace(Isic2018.url_infos[url], checksum="0" * 64)
    with pytest.raises(DataError, match=rf"(?s){name}.*wrong checksum.*--data\.dir"):
        quiet(served)
    assert datasets(served) == []
