"""From a `DataConfig` to a prepared dataset: found where it is, or checked and built.

A prepared dataset lies in `<prepared_dir>/<name>/<size>-<fingerprint>/<version>`, so that
another size, or changed source data, gives another dataset and never a stale one.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tensorflow_datasets as tfds

from jaxunet.bars import on_terminal
from jaxunet.config import DataConfig
from jaxunet.data import drawing, folder, isic2018, synthetic
from jaxunet.data.builder import BuildConfig, Example, PairsBuilder, Plan, reading
from jaxunet.data.check import check_pair
from jaxunet.data.duplicates import LIST_FILE, Looks, warning
from jaxunet.data.images import encode_png, resize_image, resize_mask
from jaxunet.data.locate import locate
from jaxunet.data.prepared import Prepared, Size, check_complete
from jaxunet.data.sources import Pair, SourcePairs, same_contents
from jaxunet.errors import DataError, SourceGone


def prepare(
    config: DataConfig, *, progress: bool = True, recorded: str | None = None
) -> Prepared:
    """Open the prepared dataset that `config` asks for; check the data and build it first
    if it isn't there.

    >>> data = jaxunet.prepare(config.data)

    Building is atomic: an error, Ctrl-C or a kill leaves no half-made dataset. Of several
    processes that prepare the same dataset one builds, and the others wait for it.

    Args:
        config: which dataset, where from, at which size, prepared where.
        progress: show a progress bar on stderr, a line for what lies beside the data, and a
            warning of pictures of different splits that look the same.
        recorded: fingerprint of the dataset that a run was trained on. Where the source is
            gone and that dataset is still there, it is opened.

    Raises:
        DataError: the source is missing, or has problems, which are all listed; or there is
            no folder to prepare datasets in.
    """
    prepared_dir = _prepared_dir(config)
    recipe = _recipe(config, recorded, progress)
    make_builder = partial(
        recipe.builder,
        data_dir=prepared_dir,
        config=BuildConfig(
            name=f"{recipe.stored_size}-{recipe.fingerprint}",
            stored_size=recipe.stored_size,
            plan=recipe.plan,
            progress=progress,
        ),
    )
    with _quiet():
        builder = make_builder()
        directory = Path(builder.data_path)
        if recipe.gone and not directory.exists():
            raise DataError(
                f"{recipe.gone} Nor is there what was prepared from it for the run: "
                f"{directory}. Give --data.dir where the source is now."
            )
        if not directory.exists():
            with _locked(directory.parent) as alone:
                if alone:
                    # Nobody else is building: what lies here is left of one that was killed.
                    for leftover in directory.parent.glob("incomplete.*"):
                        shutil.rmtree(leftover, ignore_errors=True)
                if not directory.exists():
                    _build(builder, directory, progress)
            builder = make_builder()
    check_complete(directory)
    if progress and (listed := directory / LIST_FILE).exists():
        with reading(directory):
            said = warning(json.loads(listed.read_text(encoding="utf-8")), listed)
        print(said, file=sys.stderr)
    if recipe.gone and progress:
        print(
            f"{recipe.gone} Going on with what was prepared from it: {directory}",
            file=sys.stderr,
        )
    return Prepared(
        name=config.name,
        directory=directory,
        fingerprint=recipe.fingerprint,
        stored_size=recipe.stored_size,
        counts={name: split.num_examples for name, split in builder.info.splits.items()},
        official_counts=dict(recipe.official_counts),
        needs=recipe.needs,
        max_megapixels=config.max_megapixels,
        ignores=config.ignore_value is not None,
    )


def _prepared_dir(config: DataConfig) -> Path | None:
    """Where to keep prepared datasets; None for TFDS's default, a folder that there is."""
    # What `~` stands for is not asked by TFDS: for a user without a home, for itself.
    wanted = config.prepared_dir or Path(os.environ.get("TFDS_DATA_DIR", "~"))
    try:
        found = wanted.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"Prepared datasets are to go below {wanted}, but no such home folder is known. "
            "Give another place by --data.prepared-dir or the environment variable "
            "TFDS_DATA_DIR."
        ) from error
    return config.prepared_dir and found


@dataclass(frozen=True)
class _BuildSpec:
    """How one configuration is built; making it reads files for the fingerprint, no pixels."""

    builder: type[PairsBuilder]
    stored_size: Size
    fingerprint: str
    plan: Callable[[tfds.download.DownloadManager], Plan]
    needs: dict[str, str]
    official_counts: dict[str, int | None]
    gone: str = ""
    """Why the dataset cannot be built, but only opened."""


def _recipe(config: DataConfig, recorded: str | None, progress: bool) -> _BuildSpec:
    splits = ("train", "validation", "test")
    size = config.resolved_stored_size
    if config.name == "synthetic":
        side = config.image_size if config.stored_size in ("auto", "native") else size
        assert isinstance(side, int)
        counts = {
            "train": config.synthetic_train,
            "validation": config.synthetic_validation,
            "test": config.synthetic_validation,
        }
        plan = synthetic.plan(config.synthetic_seed, counts, side)
        return _BuildSpec(
            synthetic.Synthetic,
            side,
            _digest(config.synthetic_seed, counts, drawing.VERSION),
            lambda manager: plan,
            dict.fromkeys(splits, "nothing"),
            dict.fromkeys(splits),
        )
    if config.name == "isic2018":
        needs = {split: isic2018.required_files(split) for split in splits}
        official: dict[str, int | None] = dict(isic2018.OFFICIAL_COUNTS)
        if config.dir is None:
            return _BuildSpec(
                isic2018.Isic2018,
                size,
                _digest(sorted(map(repr, isic2018.Isic2018.url_infos.items()))),
                lambda manager: _plan(
                    isic2018.download(manager).read_as(config), config, "the download"
                ),
                needs,
                official,
            )
        builder: type[PairsBuilder] = isic2018.Isic2018
    else:
        needs = {split: folder.required_files(split) for split in splits}
        official = dict.fromkeys(splits)
        builder = folder.Folder
    try:
        source, fingerprint = locate(config)
    except SourceGone as error:
        if recorded is None:
            raise
        source, fingerprint, gone = SourcePairs({}), recorded, str(error)
    else:
        gone = ""
    if progress:
        for remark in source.remarks:
            print(remark, file=sys.stderr)
    return _BuildSpec(
        builder,
        size,
        fingerprint,
        lambda manager: _plan(source, config, config.dir),
        needs,
        official,
        gone,
    )


def _plan(source: SourcePairs, config: DataConfig, where: object) -> Plan:
    size, looks = config.resolved_stored_size, Looks(source.splits)
    items = {split: {pair.id: pair for pair in pairs} for split, pairs in source.splits.items()}
    everything = [pair for pairs in source.splits.values() for pair in pairs]
    mean_bytes = sum(p.image.size + p.mask.size for p in everything) // max(1, len(everything))
    # The challenge's own data are taken as they are.
    copies = same_contents(everything) if config.name == "folder" else []
    return Plan(
        items=items,
        make=partial(_make, size, looks),
        where=where,
        problems=source.problems + copies,
        bytes_per_example=max(1, mean_bytes) if size == "native" else 4 * size * size,
        finish=looks.write,
    )


def _make(size: Size, looks: Looks, pair: Pair) -> Example | list[str]:
    checked = check_pair(pair, side=size if isinstance(size, int) else None)
    if isinstance(checked, list):
        return checked
    looks.note(pair, checked.image)
    image_file, mask = checked.image_file, checked.mask
    if isinstance(size, int):
        image_file = encode_png(resize_image(checked.image, size, size))
        mask = resize_mask(mask, size, size)
    return {"id": checked.id, "image": image_file, "mask": encode_png(mask)}


def _build(builder: PairsBuilder, directory: Path, progress: bool) -> None:
    # TFDS's own bars don't know the total; its bar of a download is worth seeing.
    shown = progress and on_terminal()
    (tfds.enable_progress_bar if shown else tfds.disable_progress_bar)()
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises the latter
        if directory.exists():
            return  # Another process, which the lock could not hold back, was first.
        reason = str(error).splitlines()[0].partition(";")[0]
        raise DataError(f"{directory} cannot be written: {reason}.") from error


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what TFDS prints and logs of its own accord."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _locked(folder_: Path) -> Iterator[bool]:
    """Hold the folder's lock, waiting for it; False where the system has no such locks.

    The system lets go of it when a process dies, however it dies.
    """
    try:
        folder_.mkdir(parents=True, exist_ok=True)
        file = (folder_ / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder_} cannot be written: {error}.") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
        else:
            yield True
