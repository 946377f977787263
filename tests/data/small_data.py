"""Small datasets on disk, made with Pillow and zipfile only."""

import dataclasses
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from jaxunet.config import DataConfig
from jaxunet.data import Prepared, prepare


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
