"""Score a run, or several together: `python experiments/evaluate.py RUN --split SPLIT`."""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import jax
import numpy as np
import tyro
from command_line import parse, print_scores, run_script
from model_options import ModelOptions, check_replaces, needs_out, runs_of

from jaxunet.bench import flops
from jaxunet.config import Config, DataConfig
from jaxunet.config_json import to_dict
from jaxunet.data import prepare
from jaxunet.data.reader import DataSource
from jaxunet.data.sources import Pair
from jaxunet.devices import distributed, tuning
from jaxunet.devices.environment import command_line, environment
from jaxunet.devices.strategies import Strategy, check_divisible, make_strategy
from jaxunet.errors import ConfigError, DataError
from jaxunet.files import check_writable, write_atomically, write_json
from jaxunet.inference.challenge import TOLERANCE, evaluate_native, originals, zip_masks
from jaxunet.inference.pictures import MASK_SUFFIX
from jaxunet.learning.metrics import per_image
from jaxunet.learning.views import QUARTERS
from jaxunet.ranges import require_at_least
from jaxunet.runs import figures, reliability
from jaxunet.runs.evaluation import Evaluation, check_hosts, describe_split, report, table
from jaxunet.runs.loading import Masks, TrainedModel, compile_masks, compile_probabilities
from jaxunet.runs.record import (
    config_of_main,
    load_config,
    other_data,
    read_record,
    recorded_dataset,
    recorded_fingerprint,
)
from jaxunet.runs.reporting import drawn, prediction_rows
from jaxunet.runs.scoring import evaluate_split

DESCRIPTION = "Score a run, or several as an ensemble, on a split of its own data or of others."
T = TypeVar("T")
Kept = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]

OF_RUN = ("image_size", "stored_size", "train_split", "validation_split")
"""Fields of `DataConfig` that belong to the model, whatever data it is scored on."""

READING = ("prepared_dir", "max_megapixels", "loader", "cache", "workers")
"""Fields of `DataConfig` that say how data are read, not which."""


@dataclass(frozen=True)
class Data(DataConfig):
    """Which data to score. What is not given is as in the run, but with another --data.name
    as shown."""

    image_size: Kept[int] = 256
    stored_size: Kept[int | Literal["native", "auto"]] = "auto"
    train_split: Kept[str] = "train"
    validation_split: Kept[str] = "validation"

    def __post_init__(self) -> None:
        """Nothing is checked before what was not given is filled in."""


@dataclass(frozen=True)
class Arguments(ModelOptions):
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py."""
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """More of them: an ensemble, whose probabilities are averaged. It needs --out."""
    split: str = "validation"
    """Split to score; TFDS slices such as `test[:100]` work."""
    out: Path | None = None
    """Folder to write to (none: the run directory)."""
    parallel: Literal["pmap", "jit"] = "pmap"
    """How steps are spread over devices."""
    distributed: bool = False
    """Be one of several processes, each started with this same command; see the README."""
    native: bool = False
    """Predict each original at its own size, write the masks to OUT/native-SPLIT, and score
    them as the challenge does."""
    tolerance: float = TOLERANCE
    """With --native, how far a boundary may be off and still count for the normalised surface
    distance, in pixels of each picture's own size."""
    worst: int = 0
    """Draw so many of the images with the lowest Dice, with both outlines (two dozen, say)."""
    reliability: bool = False
    """Draw predicted probability against the share of lesion."""
    zip: bool = False
    """With --native, also pack the masks into OUT/native-SPLIT.zip, ready to submit."""
    data: Data = Data()


def choose_data(arguments: Arguments, own: DataConfig) -> tuple[DataConfig, bool]:
    """The data to score, and whether the options say so, rather than how to read them."""
    given, default = arguments.data, Data()
    filled = parse(Arguments, DESCRIPTION, replace(arguments, data=Data(**vars(own)))).data
    if filled.name != own.name:
        kept = {name: getattr(own, name) for name in OF_RUN}
        prepared_dir = given.prepared_dir or own.prepared_dir
        filled = replace(given, **kept, prepared_dir=prepared_dir)
    on_purpose = any(
        getattr(given, name) != getattr(default, name) or getattr(filled, name) != value
        for name, value in vars(own).items()
        if name not in (*OF_RUN, *READING)
    )
    return DataConfig(**vars(filled)), on_purpose


def fingerprint_of(result: Any) -> str:
    return str(result["dataset"]["fingerprint"])


def score_originals(
    model: TrainedModel,
    strategy: Strategy,
    pairs: list[Pair],
    out: Path,
    config: Config,
    tolerance: float,
    clean: bool,
) -> Evaluation:
    if config.data.ignore_value is not None:
        print(
            "hd95 and nsd are left out: with data.ignore_value nobody knows where an outline "
            "runs through pixels that don't count.",
            file=sys.stderr,
        )
    start = time.perf_counter()
    counts, boundary = evaluate_native(
        compile_probabilities(strategy, model.recipe, model.variables),
        pairs,
        out,
        image_size=config.data.image_size,
        threshold=model.recipe.threshold,
        batch_size=tuning.eval_batch_size(config.train),
        tolerance=tolerance,
        clean=clean,
    )
    return Evaluation(counts, None, time.perf_counter() - start, boundary)


def draw_worst(
    masks: Masks,
    source: DataSource,
    evaluation: Evaluation,
    config: Config,
    count: int,
    path: Path,
) -> list[Path]:
    """The gallery beside `path`; nothing, and a line on stderr, if it can't be drawn."""
    order = np.argsort(per_image(evaluation.counts)["dice"], kind="stable")
    chosen = [(int(index), "") for index in order[:count]]
    rows = prediction_rows(chosen, masks, evaluation.counts, source, config)
    picture = path.with_name(f"{path.stem}-worst.png")
    title = f"The {len(rows)} images with the lowest Dice of {len(order)}"
    return drawn(picture, partial(figures.gallery, rows, picture, title))


def main() -> None:
    arguments = parse(Arguments, DESCRIPTION)
    if arguments.zip and not arguments.native:
        raise ConfigError("--zip packs the masks that --native writes: add --native.")
    if arguments.tolerance != TOLERANCE and not arguments.native:
        raise ConfigError(
            "--tolerance is for the boundary's scores at native size: add --native."
        )
    require_at_least("--worst", arguments.worst, 0)
    require_at_least("--tolerance", arguments.tolerance, 0)
    alone = not arguments.native and not arguments.distributed
    if arguments.worst and not alone:
        raise ConfigError("--worst draws in one process, at the model's size: leave it out.")
    if arguments.reliability and arguments.native:
        raise ConfigError("--reliability is of maps at the model's size: leave out --native.")
    runs, split = (arguments.run, *arguments.others), arguments.split
    out = needs_out(runs, arguments.out)
    arguments.use_tuning(runs, several=arguments.distributed)
    if arguments.distributed:
        if arguments.native:
            raise ConfigError("--native runs in one process: leave out --distributed.")
        distributed.initialize()
    strategy = make_strategy(arguments.parallel)
    distributed.on_main(
        lambda: check_writable(out, "--out" if arguments.out else "RUN"), "checking --out"
    )
    own = config_of_main(partial(load_config, runs[0]))
    eval_batch_size = tuning.eval_batch_size(own.train)
    check_divisible("train.eval_batch_size", eval_batch_size, jax.device_count())
    chosen, on_purpose = choose_data(arguments, own.data)
    if arguments.tolerance != TOLERANCE and chosen.ignore_value is not None:
        raise ConfigError("--tolerance is of scores that data.ignore_value leaves out.")
    config = replace(own, data=chosen)
    model = arguments.load(runs, strategy, data=chosen, show_progress=distributed.is_main())
    if arguments.native:
        pairs, dataset = originals(chosen, split)
        ids = [pair.id for pair in pairs]
    else:
        recorded = None if on_purpose else recorded_fingerprint(runs[0])
        data = distributed.main_first(
            lambda: prepare(chosen, progress=distributed.is_main(), recorded=recorded),
            "preparing the data",
        )
        check_hosts(config, data)
        dataset = describe_split(data, split, chosen.image_size)
        ids = data.ids(split)

    def changed() -> str | None:
        return next(filter(None, (other_data(run, dataset, chosen) for run in runs)), None)

    difference = distributed.on_main(changed, "comparing the data")
    if difference and not on_purpose:
        raise DataError(
            f"{difference} What was trained on may now be in {split}. If they are meant, as "
            "other data than the run's, say so with --data.dir."
        )
    other = chosen.name if difference else None
    name = arguments.file_name(split, native=arguments.native, other=other)
    off = "" if arguments.tolerance == TOLERANCE else f"-tolerance-{arguments.tolerance}"
    path = out / f"evaluation-{name}{off}.json"
    how = arguments.described(model)

    def check_out() -> None:
        if difference:
            check_replaces(path, "data", dataset["fingerprint"], fingerprint_of)
        if arguments.out:
            check_replaces(path, "runs", runs_of(how), runs_of)

    distributed.on_main(check_out, "checking --out")
    if arguments.native:
        evaluation = score_originals(
            *(model, strategy, pairs, out / name, config),
            tolerance=arguments.tolerance,
            clean=arguments.clean,
        )
        if arguments.zip:
            masks = [out / name / f"{pair.id}{MASK_SUFFIX}.png" for pair in pairs]
            zip_masks(masks, out / f"{name}.zip")
    else:
        evaluation = evaluate_split(
            model,
            strategy,
            data,
            split,
            chosen,
            clean=arguments.clean,
            show_progress=distributed.is_main(),
        )
    if not distributed.is_main():
        return
    tuning.keep(runs[0])
    result = report(evaluation, dataset=dataset, step=model.step, epoch=model.epoch)
    made = {"config": to_dict(config), "command": command_line(), **environment()}
    sizes = [flops.size(m.config.model, config.data.image_size) for m in model.members]
    made["model"] = size = {name: sum(each[name] for each in sizes) for name in sizes[0]}
    size["gflops"] *= 2 * len(QUARTERS[arguments.views]) or 1
    if evaluation.boundary is not None:
        made["tolerance"] = arguments.tolerance
    trained_on = recorded_dataset(read_record(runs[0]))
    each = path.with_suffix(".csv")
    write_atomically(each, table(ids, evaluation))
    write_json(path, {**result, **how, "trained_on": trained_on, **made})
    print_scores(result)
    print(f"{size['parameters']:,} parameters, {size['gflops']:.4g} GFLOPs an image")
    written = [path, each]
    if arguments.worst:
        written += draw_worst(
            compile_masks(strategy, model.recipe, model.variables, clean=arguments.clean),
            data.source(split),
            evaluation,
            model.config,
            arguments.worst,
            path,
        )
    if arguments.reliability:
        picture = path.with_name(f"{path.stem}-reliability.png")
        title = f"{dataset['name']} {dataset['split']}, {dataset['count']} images"
        draw = partial(reliability.draw, result["calibration"], picture, title)
        written += drawn(picture, draw)
    print(f"Written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    run_script(main)
