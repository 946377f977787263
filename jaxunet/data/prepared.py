"""A dataset that has been prepared: its splits, counts and examples."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds

from jaxunet.config import MAX_MEGAPIXELS
from jaxunet.data.builder import IDS_FILE, features, reading
from jaxunet.data.records import Records
from jaxunet.errors import DataError

Size = int | Literal["native"]


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset on disk."""

    name: str
    directory: Path
    fingerprint: str
    """Changes with the source data and with what was asked of it."""
    stored_size: Size
    counts: dict[str, int]
    """Number of examples of each split that there is."""
    official_counts: dict[str, int | None]
    """What the challenge has, for the splits that it has; None where that means nothing."""
    needs: dict[str, str]
    """For each split that this dataset can have, the files that it is made from."""
    max_megapixels: int = MAX_MEGAPIXELS
    """Largest image that is decoded."""
    ignores: bool = False
    """Whether masks hold `IGNORED` where a pixel doesn't count."""

    def source(self, split: str) -> Records:
        """Random access to a split or a TFDS slice of one, such as `train[:90%]`.

        Examples are in order of their ids.

        Raises:
            DataError: there is no such split, or the slice is malformed or empty.
        """
        files = self._split(split).file_instructions
        return Records(files, self.stored_size, self.max_megapixels, self.ignores)

    def count(self, split: str) -> int:
        """Number of examples of a split or slice."""
        return self._split(split).num_examples

    def shared(self, split: str, other: str) -> int:
        """Number of examples that both splits or slices have."""
        held = [
            {
                (str(part.filename), index)
                for part in self._split(each).file_instructions
                for index in range(part.skip, part.skip + part.take)
            }
            for each in (split, other)
        ]
        return len(set.intersection(*held))

    def official_count(self, split: str) -> int | None:
        """Number of examples that the challenge's split has, if it is one of its splits.

        Of a slice it is the number of the whole split, from which it then differs.
        """
        self._split(split)
        bases = _base_names(split)
        return self.official_counts[bases[0]] if len(bases) == 1 else None

    def ids(self, split: str) -> list[str]:
        """Ids of the examples of a split or slice, in order."""
        ids = json.loads((self.directory / IDS_FILE).read_text())
        by_file: dict[str, list[str]] = {}
        for name, info in self._info.splits.items():
            rest = iter(ids[name])
            for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
                by_file[str(path)] = list(islice(rest, length))
        return [
            key
            for part in self._split(split).file_instructions
            for key in by_file[str(part.filename)][part.skip : part.skip + part.take]
        ]

    def _split(self, split: str) -> Any:
        for base in _base_names(split):
            if base not in self.counts:
                needed = self.needs.get(base)
                raise DataError(
                    f"{self.name} has no split {base!r} here; it has "
                    f"{', '.join(self.counts)}. "
                    + (
                        f"{base} needs {needed}."
                        if needed
                        else f"Known splits: {', '.join(self.needs)}."
                    )
                )
        try:
            found = self._info.splits[split]
        except (ValueError, KeyError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"Split {split!r} cannot be read: {reason}") from error
        if not found.num_examples:
            raise DataError(f"Split {split!r} of {self.name} selects no examples.")
        return found

    @cached_property
    def _info(self) -> tfds.core.DatasetInfo:
        return _read_info(self.directory)


def check_complete(directory: Path) -> None:
    """Raise `DataError` if files of a prepared dataset are gone, cut short or garbled."""
    info = _read_info(directory)
    with reading(directory):
        ids = json.loads((directory / IDS_FILE).read_text(encoding="utf-8"))
        counts = {name: split.num_examples for name, split in info.splits.items()}
        if {name: len(ids[name]) for name in ids} != counts:
            raise ValueError(f"{IDS_FILE} does not hold the ids of {counts}")
    paths = [Path(path) for split in info.splits.values() for path in split.filepaths]
    found = sum(path.stat().st_size for path in paths if path.exists())
    expected = sum(split.num_bytes for split in info.splits.values())
    if not paths or found != expected:
        raise DataError(
            f"{directory} is damaged ({found:,} bytes of {expected:,}). Delete it, and it "
            "will be prepared again."
        )


def _read_info(directory: Path) -> tfds.core.DatasetInfo:
    with reading(directory):
        _check_class_names(directory / "features.json")
        return tfds.builder_from_directory(directory).info


def _check_class_names(path: Path) -> None:
    """Raise `ValueError` if the file names anything that is none of our features' classes.

    TFDS imports the module of whatever class is named there.
    """
    known = {
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in (type(features(1)), *(type(each) for each in features(1).values()))
    }

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            value = list(value.values())
        for each in value if isinstance(value, list) else []:
            yield from strings(each)
        if isinstance(value, str):
            yield value

    for found in strings(json.loads(path.read_text(encoding="utf-8"))):
        # A name without a dot is no name of a class.
        if "." in found and found not in known:
            raise ValueError(f"{path.name} names {found!r}, which is not imported")


def _base_names(split: str) -> list[str]:
    """Splits that a TFDS expression such as `train[:90%]+test` speaks of."""
    return [re.split(r"\[", part.strip())[0] for part in split.split("+")]
