"""Score a run on a split: `python experiments/evaluate.py RUN --split SPLIT`."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from command_line import parse, print_scores, run_script

from jaxunet.config import to_dict
from jaxunet.data import prepare
from jaxunet.evaluation import evaluate, report
from jaxunet.files import write_json
from jaxunet.parallel import check_divisible, make_strategy
from jaxunet.run import command_line, environment
from jaxunet.steps import eval_step
from jaxunet.trained import load
from jaxunet.training import describe_split


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
    data: DataOptions = DataOptions()


def main() -> None:
    arguments = parse(Arguments, "Score a run on a split.")
    model = load(arguments.run, arguments.checkpoint)
    given = {k: v for k, v in vars(arguments.data).items() if v is not None}
    config = replace(model.config, data=replace(model.config.data, **given))
    check_divisible("train.eval_batch_size", config.train.eval_batch_size, jax.device_count())
    data = prepare(config.data)
    source = data.source(arguments.split)
    strategy = make_strategy(arguments.parallel)
    evaluation = evaluate(
        strategy,
        strategy.compile(partial(eval_step, model.recipe), outputs="replicated"),
        strategy.replicate(model.variables),
        source,
        config,
    )
    result = report(
        evaluation,
        dataset=describe_split(data, arguments.split, config.data.image_size),
        step=model.step,
        epoch=model.epoch,
    )
    print_scores(result)
    name = "".join(c if c.isalnum() else "-" for c in arguments.split).strip("-")
    path = arguments.run / f"evaluation-{name}.json"
    record = {"config": to_dict(config), "command": command_line(), **environment()}
    write_json(path, {**result, **record})
    print(f"Written: {path}")


if __name__ == "__main__":
    run_script(main)
