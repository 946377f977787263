"""Small datasets on disk, made with Pillow and zipfile only."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo

from jaxunet.config import DataConfig
from jaxunet.data import Prepared, prepare
from jaxunet.data.isic2018 import Isic2018


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


def picture(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def half_mask(height: int = 30, width: int = 40) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    """A zip with the one top folder that the official archives have."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in files.items():
            archive.writestr(f"{path.stem}/{name}", contents)


def isic_files(ids: list[int]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    images = {f"ISIC_{i:07d}.jpg": encoded(picture(i), "JPEG") for i in ids}
    masks = {f"ISIC_{i:07d}_segmentation.png": encoded(half_mask()) for i in ids}
    return images, masks


def quiet(config: DataConfig, **changes: object) -> Prepared:
    return prepare(dataclasses.replace(config, **changes), progress=False)


def datasets(config: DataConfig) -> list[Path]:
    """Everything that looks like a dataset, whole or not, in the prepared folder."""
    assert config.prepared_dir is not None
    return sorted(config.prepared_dir.glob("*/*/*1.1.0"))


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextlib.contextmanager
def served(root: Path) -> Iterator[None]:
    """The zips in `root` behind a web server, registered as the official ones are."""
    handler = functools.partial(Server, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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
            yield
        server.shutdown()
