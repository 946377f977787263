"""What the three TFDS builders share: features, the record format, sharding, progress.

`ShardBasedBuilder` is used because `GeneratorBasedBuilder` sorts all records of a split in
memory, and from 1 GB on does so through TensorFlow; here records are written in the order
in which they come.
"""

import contextlib
import dataclasses
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

from jaxunet.bars import Bar
from jaxunet.data.check import report
from jaxunet.data.images import TooLarge
from jaxunet.errors import DataError
from jaxunet.workers import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
Example = dict[str, Any]
"""What is stored of a pair: `id`, and `image` and `mask` as encoded files."""

IDS_FILE = "split_ids.json"
"""In a prepared dataset: which ids each split holds, in order."""

SHARD_BYTES = 256 * 2**20
"""TFDS holds the records of one shard in memory while it writes them."""


def features(stored_size: int | Literal["native"]) -> tfds.features.FeaturesDict:
    """TFDS features of a stored example."""
    side = None if stored_size == "native" else stored_size
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(side, side, 3)),
            "mask": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
        }
    )


@dataclasses.dataclass
class Plan:
    """All that a build will do: per split the items, and how one becomes an example."""

    items: Mapping[str, Mapping[str, Any]]
    """Per split, items by their ids, in the order in which they are stored."""
    make: Callable[[Any], Example | list[str]]
    """Runs in a thread; gives the example, or what is wrong with the item."""
    where: object
    """What errors call the place that the items come from."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """What is known to be wrong before any item is made."""
    bytes_per_example: int = 2**20
    finish: Callable[[Path], None] = lambda folder: None
    """Writes what else is known into the dataset's folder, once all examples are made."""


@dataclasses.dataclass
class BuildConfig(tfds.core.BuilderConfig):
    """TFDS configuration of one prepared dataset; its name tells size and fingerprint."""

    stored_size: int | Literal["native"] = 256
    plan: Callable[[tfds.download.DownloadManager], Plan] | None = None
    """Finds the items; needed only to build."""
    progress: bool = True


@contextlib.contextmanager
def reading(directory: object) -> Iterator[None]:
    """Whatever reading a prepared dataset raises, as a `DataError` that says what to do."""
    try:
        yield
    except (MemoryError, TooLarge):  # which are of this machine and of what was asked
        raise
    except Exception as error:  # TFDS, protobuf and ArrayRecord each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{directory} is damaged, or was prepared by another version: "
            f"{reason[:200].rstrip('.')}. "
            "Delete it, and it will be prepared again."
        ) from error


class _Info(tfds.core.DatasetInfo):
    def read_from_directory(self, dataset_info_dir: Any) -> None:
        with reading(dataset_info_dir):
            super().read_from_directory(dataset_info_dir)

    def initialize_from_bucket(self) -> None:
        """Do nothing: TFDS would look for these datasets in Google's bucket."""


class PairsBuilder(tfds.core.ShardBasedBuilder):
    """Base of the builders: images with masks, in the order of the plan."""

    # TFDS would look for checksums beside the class's file, and to do so import a package
    # (importlib_resources) that it doesn't declare.
    url_infos: dict[str, UrlInfo] | None = None
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.1.0": "Large JPEGs are decoded at a fraction of their size.",
        "1.0.0": "First.",
    }
    DESCRIPTION = ""
    HOMEPAGE = ""
    LICENCE = ""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        return _Info(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            license=self.LICENCE,
            features=features(config.stored_size),
            disable_shuffling=True,
            supervised_keys=("image", "mask"),
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[int, Example]]]]]:
        config = self.builder_config
        plan = config.plan(dl_manager)
        folder = Path(self.data_path)
        stream = _examples(plan, folder, f"Preparing {self.name}", config.progress)
        if plan.problems or not any(plan.items.values()):
            next(stream)
        ids = {split: list(items) for split, items in plan.items.items()}
        (folder / IDS_FILE).write_text(json.dumps(ids, indent=1))
        per_shard = max(1, SHARD_BYTES // plan.bytes_per_example)

        # TFDS writes shards one after the other, in this order, so that all of them can
        # draw from one stream and the workers don't stop at the end of a shard.
        def shard(count: int) -> Iterator[tuple[int, Example]]:
            return enumerate(itertools.islice(stream, count))

        return {
            split: [
                partial(shard, min(per_shard, len(items) - start))
                for start in range(0, len(items), per_shard)
            ]
            for split, items in plan.items.items()
        }


def _examples(plan: Plan, folder: Path, title: str, progress: bool) -> Iterator[Example]:
    """Make the examples of all splits; after a first problem, only look for more.

    Raises:
        DataError: with every problem, once everything was looked at.
    """
    problems = list(plan.problems)
    total = sum(map(len, plan.items.values()))
    everything = itertools.chain.from_iterable(items.values() for items in plan.items.values())
    with Bar[Any](title, total, unit="image", leave=True, show=progress) as bar:
        for done, result in enumerate(map_in_threads(plan.make, everything), start=1):
            bar.update()
            if isinstance(result, list):
                problems += result
            elif not problems:
                if done == total:  # after it nobody asks again
                    plan.finish(folder)
                yield result
    if problems:
        raise DataError(report(plan.where, problems))


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`map` over threads, in order, with only a few results waiting at any time.

    Pillow decodes, resizes and encodes without holding Python's lock.
    """
    workers = min(8, usable_cores())  # Each may hold a decoded image of 384 MB.
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
