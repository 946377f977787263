"""Random access to the examples of a prepared split."""

from collections.abc import Iterator, Sequence
from functools import cache
from operator import index as as_index
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import UInt8

from jaxunet.config import IGNORED, MAX_MEGAPIXELS
from jaxunet.data.builder import features, reading
from jaxunet.data.images import read_image
from jaxunet.data.masks import read_mask


class Example(TypedDict):
    """One example as it is stored, at the size at which it is stored."""

    id: str
    image: UInt8[np.ndarray, "height width 3"]
    mask: UInt8[np.ndarray, "height width 1"]
    """0 or 255, or `IGNORED`."""


class Records:
    """A sequence of examples, decoded when asked for. It can be pickled and shared."""

    def __init__(
        self,
        files: Sequence[Any],
        stored_size: int | Literal["native"],
        max_megapixels: int = MAX_MEGAPIXELS,
        ignores: bool = False,
    ) -> None:
        """Open the records.

        Args:
            files: TFDS file instructions (file name, records to skip and to take).
            stored_size: of the images, in pixels.
            max_megapixels: an example with a larger image is refused.
            ignores: whether masks may hold `IGNORED`.
        """
        self.max_megapixels = max_megapixels
        self.ignore_value = IGNORED if ignores else None
        self.stored_size = stored_size
        self._directory = Path(files[0].filename).parent
        self._records = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """The example, decoded.

        Raises:
            DataError: its record is damaged.
        """
        position = as_index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"Example {position} of {len(self)} in {self._directory}.")
        with reading(self._directory):
            stored = self.stored(position)
            key = stored["id"].decode()
            return {
                "id": key,
                "image": read_image(
                    stored["image"], name=f"image {key}", max_megapixels=self.max_megapixels
                ),
                "mask": read_mask(
                    stored["mask"],
                    ignore_value=self.ignore_value,
                    name=f"mask {key}",
                    max_megapixels=self.max_megapixels,
                ),
            }

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def stored(self, index: int) -> dict[str, bytes]:
        """The encoded files of an example: `id`, `image` (PNG or original), `mask` (PNG)."""
        record = self._records[index % len(self)]
        # Decoded here, not by TFDS, which would take OpenCV where it is installed and so
        # give other pixels for the same JPEG on another machine.
        skip = tfds.decode.SkipDecoding()
        return _features(self.stored_size).deserialize_example_np(
            record, decoders={"image": skip, "mask": skip}
        )


_features = cache(features)
