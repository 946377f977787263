"""Score a run on a split: `python experiments/evaluate.py RUN --split SPLIT`."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from command_line import parse, print_scores, run_script

from jaxunet import distributed
from jaxunet.challenge import evaluate_native, originals
from jaxunet.config import Config, to_dict
from jaxunet.data import prepare
from jaxunet.environment import command_line, environment
from jaxunet.errors import ConfigError
from jaxunet.evaluation import Evaluation, describe_split, evaluate, report
from jaxunet.feed import Feed
from jaxunet.files import write_json
from jaxunet.parallel import Strategy, check_divisible, make_strategy
from jaxunet.prediction import zip_masks
from jaxunet.steps import eval_step
from jaxunet.trained import TrainedModel, compile_probabilities, load


@dataclass(frozen=True)
class DataOptions:
    dir: Path | None = None
    """Where the source files are (none: where the run was trained from)."""
    prepared_dir: Path | None = None
    """Where prepared datasets are kept (none: as in the run)."""


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py."""
    split: str = "validation"
    """Split to score; TFDS slices such as `test[:100]` work."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint: the last one, or the best on the validation split."""
    parallel: Literal["pmap", "jit"] = "pmap"
    """How steps are spread over devices."""
    distributed: bool = False
    """Be one of several processes, each started with this same command; see the README."""
    native: bool = False
    """Predict each original at its own size, write the masks to RUN/native-SPLIT, and score
    them as the challenge does."""
    zip: bool = False
    """With --native, also pack the masks into RUN/native-SPLIT.zip, ready to submit."""
    data: DataOptions = DataOptions()


def score_originals(
    model: TrainedModel, strategy: Strategy, config: Config, split: str, out: Path
) -> tuple[Evaluation, dict[str, Any]]:
    start = time.perf_counter()
    pairs, dataset = originals(config.data, split)
    counts = evaluate_native(
        compile_probabilities(strategy, model.recipe, model.variables),
        pairs,
        out,
        image_size=config.data.image_size,
        threshold=config.train.threshold,
        batch_size=config.train.eval_batch_size,
    )
    return Evaluation(counts, None, time.perf_counter() - start), dataset


def main() -> None:
    arguments = parse(Arguments, "Score a run on a split.")
    if arguments.distributed:
        if arguments.native:
            raise ConfigError("--native runs in one process: leave out --distributed.")
        distributed.initialize()
    model = load(arguments.run, arguments.checkpoint)
    given = {k: v for k, v in vars(arguments.data).items() if v is not None}
    config = replace(model.config, data=replace(model.config.data, **given))
    check_divisible("train.eval_batch_size", config.train.eval_batch_size, jax.device_count())
    strategy = make_strategy(arguments.parallel)
    name = "".join(c if c.isalnum() else "-" for c in arguments.split).strip("-")
    if arguments.native:
        name = f"native-{name}"
        evaluation, dataset = score_originals(
            model, strategy, config, arguments.split, arguments.run / name
        )
        if arguments.zip:
            zip_masks(arguments.run / name, arguments.run / f"{name}.zip")
    else:
        data = distributed.main_first(
            lambda: prepare(config.data, progress=distributed.is_main()), "preparing the data"
        )
        feed = Feed(
            strategy,
            data.source(arguments.split),
            config.data,
            progress=distributed.is_main(),
        )
        evaluation = evaluate(
            feed,
            feed.compile(partial(eval_step, model.recipe), outputs="replicated"),
            strategy.replicate(model.variables),
            config,
            progress=distributed.is_main(),
        )
        dataset = describe_split(data, arguments.split, config.data.image_size)
    if not distributed.is_main():
        return
    result = report(evaluation, dataset=dataset, step=model.step, epoch=model.epoch)
    print_scores(result)
    path = arguments.run / f"evaluation-{name}.json"
    record = {"config": to_dict(config), "command": command_line(), **environment()}
    write_json(path, {**result, **record})
    print(f"Written: {path}")


if __name__ == "__main__":
    run_script(main)
