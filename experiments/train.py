"""Train a U-Net: `train.py [PRESET] [--section.field VALUE ...] --out RUN`."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from command_line import (
    Configured,
    look_ahead,
    parse,
    preset,
    print_scores,
    run_script,
    take_preset,
)
from presets import PRESETS

from jaxunet.data import prepare
from jaxunet.devices import distributed, tuning
from jaxunet.devices.startup import STARTED
from jaxunet.errors import ConfigError
from jaxunet.interop.starting import weights_to_start_from
from jaxunet.pretrained.starting import starting_weights
from jaxunet.runs import wandb_log
from jaxunet.runs.clock import in_words
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.profiling import steps_of
from jaxunet.runs.record import (
    config_of_main,
    load_config,
    recorded_fingerprint,
    recorded_tuning,
)
from jaxunet.runs.starting import same_start
from jaxunet.runs.training import train
from jaxunet.runs.watching import Watch


@dataclass(frozen=True)
class Arguments(tuning.Tuning, Configured):
    out: Path | None = None
    """Run directory to write (none: runs/PRESET)."""
    resume: bool = False
    """Go on with the run in --out from its latest checkpoint, or start it if there is none."""
    init_from: Path | None = None
    """Fine-tune: start from the weights of this run directory or PyTorch file. Every tensor
    whose name and shape fit is taken, the others stay as they are drawn. Not used once the run
    has a checkpoint of its own."""
    stop_after: str | None = None
    """Save and end after so long, such as 30m, 1.5h or 900s, counted from the start of the
    command; exit status 0. Go on with --resume."""
    accept_other_data: bool = False
    """With --resume: go on though the data are not those that the run was trained on."""
    log: Literal["wandb"] | None = None
    """Log to Weights & Biases, too (extra `[wandb]`; WANDB_MODE=offline needs no account). A
    resumed run goes on with the same wandb run."""
    profile_steps: str | None = None
    """A:B traces the run from when A steps are done until B are, for TensorBoard's profile
    plugin: 10:13 are the steps 11, 12 and 13. It is left in RUN/tensorboard."""
    parallel: Literal["pmap", "jit"] = "pmap"
    """How steps are spread over devices; both compute the same."""
    distributed: bool = False
    """Be one of several processes, each started with this same command; see the README."""


def seconds_of(text: str) -> float:
    """`30m` and the like, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or not float(found[1]):
        raise ConfigError(
            f"--stop-after is {text!r}, but must be a number with its unit: 900s, 30m, 1.5h."
        )
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def read_arguments(words: list[str]) -> tuple[Arguments, Path]:
    """The options, starting from a preset or from the run that is resumed."""
    name, rest = take_preset(words)
    start = preset(name or "demo")
    described = (
        f"Train a U-Net. PRESET is one of {', '.join(PRESETS)} (none: demo), or a run's "
        "config.json: train like that one, but for what the options say."
    )
    run = look_ahead(rest)
    if name is None and run.resume and run.out and (run.out / "config.json").exists():
        start = load_config(run.out)
    default = Arguments(start.data, start.model, start.optimizer, start.train)
    arguments = parse(Arguments, described, default, rest)
    default_out = Path("runs") / (name or "demo")
    if name not in (None, *PRESETS) and arguments.out is None:
        raise ConfigError(f"Give --out: a run like {name} needs a folder of its own.")
    return arguments, arguments.out or default_out


def watched(arguments: Arguments) -> Watch:
    """What `--log` and `--profile-steps` ask for, once it is sure that it can be had."""
    text = arguments.profile_steps
    steps = None if text is None else steps_of(text)
    if arguments.log == "wandb":
        distributed.on_main(wandb_log.check, "asking wandb")
    return Watch(arguments.log, steps)


def main() -> None:
    arguments, out = read_arguments(sys.argv[1:])
    recorded = recorded_tuning(out) if arguments.resume else None
    tuning.use(arguments, out, recorded, several=arguments.distributed)
    if arguments.distributed:
        distributed.initialize()
    config = config_of_main(lambda: arguments.config)
    deadline = STARTED + seconds_of(arguments.stop_after) if arguments.stop_after else None
    watch = watched(arguments)
    given = None
    # Whatever is wrong with --out or the weights is said before the data are prepared.
    with RunDirectory(out, config, resume=arguments.resume) as run:
        if not distributed.on_main(lambda: run.has_checkpoints, "looking for checkpoints"):
            if arguments.init_from is not None:
                given = weights_to_start_from(arguments.init_from)
            same_start(starting_weights(config.model), given)
    fingerprint = recorded_fingerprint(out)
    data = distributed.main_first(
        lambda: prepare(config.data, progress=distributed.is_main(), recorded=fingerprint),
        "preparing the data",
    )
    outcome = train(
        config,
        data,
        out,
        resume=arguments.resume,
        parallel=arguments.parallel,
        accept_other_data=arguments.accept_other_data,
        init_from=given,
        deadline=deadline,
        watch=watch,
        started=STARTED,
    )
    if not distributed.is_main():
        return
    print_scores(outcome.summary)
    print(f"Time:       {in_words(outcome.summary['time'])}")
    print(f"Pictures:   {', '.join(map(str, outcome.pictures))}")
    print(f"Checkpoint: {out / 'checkpoints' / str(outcome.summary['step'])}")
    if "test" in data.counts:
        print(f"Next:       python experiments/evaluate.py {out} --split test")
    else:
        print(f"Next:       python experiments/predict.py {out} IMAGES --out {out / 'masks'}")


if __name__ == "__main__":
    run_script(main)
