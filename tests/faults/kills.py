"""Kill training at random moments, over and over: `python tests/faults/kills.py --kills 60`.

A run is started, killed by SIGKILL at a moment that the seed decides, started again with the
same command, killed again, and at last left to finish. The kill is survived when that start
gets by what the kill left, and in the end the training state, the logged lines, the scores
and the prepared dataset equal those of a run left alone, bit for bit.

Moments are spread over the phases of a run: each is awaited (a folder, a line of the log, a
progress bar), and then a few more milliseconds.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxunet.data import prepare
from jaxunet.devices.environment import environment
from jaxunet.files import write_json
from jaxunet.learning.steps import init_state, make_recipe
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.record import load_config, read_metrics

REPOSITORY = Path(__file__).parents[2]
OPTIONS = [
    *("--data.image-size", "16", "--data.synthetic-train", "40"),
    *("--data.synthetic-validation", "40", "--model.width", "4", "--model.depth", "2"),
    *("--train.epochs", "4", "--train.log-every", "1", "--optimizer.warmup-steps", "0"),
    *("--train.batch-size", "4", "--train.eval-batch-size", "4"),
    *("--train.checkpoint-every", "2", "--optimizer.ema-decay", "0.9"),
]
TIMES_AND_CONFIG = ("seconds", "clock", "config")
PATIENCE = 300  # seconds for one start to finish


class Run:
    """One start of `train.py`, whose progress can be watched."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.text = folder, ""
        self._screen, terminal = os.openpty()  # where bars are shown
        termios.tcsetwinsize(terminal, (24, 120))
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(REPOSITORY / "experiments" / "train.py"), *OPTIONS),
                *("--data.prepared-dir", str(folder / "data")),
                *("--out", str(folder / "run"), "--resume"),
            ],
            env={
                **os.environ,
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
                "JAX_COMPILATION_CACHE_DIR": str(cache),
            },
            stdout=subprocess.DEVNULL,
            stderr=terminal,
        )
        os.close(terminal)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with os.fdopen(self._screen, "rb", buffering=0) as screen, suppress(OSError):
            while part := screen.read(4096):  # an error on Linux, once the process has ended
                self.text += part.decode(errors="replace")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> None:
        if self.process.wait(PATIENCE):
            raise AssertionError(f"status {self.process.returncode}: {self.text[-2000:]}")

    def kill_when(self, condition: Callable[["Run"], bool], delay: float) -> bool:
        """Kill `delay` seconds after `condition` holds; False if it ended before."""
        while not condition(self):
            if self.ended():
                return False
            time.sleep(0.0005)
        time.sleep(delay)
        if self.ended():
            return False
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return True


def _preparing(run: Run) -> bool:
    return any((run.folder / "data").glob("*/*/incomplete.*"))


def _saving(run: Run) -> bool:
    return any((run.folder / "run" / "checkpoints").glob("*tmp*"))


def _stepping(run: Run) -> bool:
    return "epoch " in run.text


def _evaluating(run: Run) -> bool:
    return "evaluate" in run.text


def _always(run: Run) -> bool:
    return True


# What to wait for, and how many seconds more at most.
PHASES: dict[str, tuple[Callable[[Run], bool], float]] = {
    "start": (_always, 2.5),
    "preparation": (_preparing, 0.08),
    "epoch": (_stepping, 0.4),
    "evaluation": (_evaluating, 0.04),
    "save": (_saving, 0.03),
}


def result(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for the times it took."""
    run = folder / "run"
    config = load_config(run)
    like = jax.eval_shape(partial(init_state, make_recipe(config, total_steps=1)))
    checkpoints = Checkpoints(run / "checkpoints", config.train.best_metric, read_only=True)
    step, state, progress = checkpoints.restore("latest", like)
    steps = checkpoints.steps()
    checkpoints.close()
    summary = json.loads((run / "summary.json").read_text())
    data = prepare(config.data, progress=False)  # ArrayRecord's files differ in their padding
    return {
        "step": step,
        "state": [(leaf.dtype, leaf.tobytes()) for leaf in jax.tree.leaves(state)],
        "progress": {k: v for k, v in progress.items() if k not in TIMES_AND_CONFIG},
        "steps": steps,
        "lines": [
            (line["step"], line["epoch"], line["split"], line["values"])
            for line in read_metrics(run / "metrics.jsonl")
        ],
        "scores": summary["scores"],
        "best": summary["best"],
        "data": [
            (example["id"], example["image"].tobytes(), example["mask"].tobytes())
            for split in data.counts
            for example in data.source(split)
        ],
    }


def survive(folder: Path, cache: Path, phases: list[str], rng: random.Random) -> list[str]:
    """Kill one run in `phases`, one after the other, and let it finish.

    Returns:
        The phases that it was killed in: one that is over when its turn comes is left out.

    Raises:
        AssertionError: a start failed, or what a kill left cannot be read.
    """
    killed = []
    for phase in phases:
        condition, most = PHASES[phase]
        run = Run(folder, cache)
        if not run.kill_when(condition, rng.uniform(0, most)):
            run.finish()
            continue
        killed.append(phase)
        read_metrics(folder / "run" / "metrics.jsonl")  # raises unless all lines are whole
        if (folder / "run" / "config.json").exists():
            load_config(folder / "run")
    Run(folder, cache).finish()
    return killed


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [name for name in expected if found[name] != expected[name]]


def kill_many(kills: int, seed: int, work: Path, *, progress: bool = True) -> dict[str, Any]:
    """At least `kills` kills of runs with a few each, and what came of them."""
    rng = random.Random(seed)
    cache = work / "cache"
    Run(work / "alone", cache).finish()
    expected = result(work / "alone")
    survived: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    runs = 0
    with tqdm(total=kills, unit="kill", disable=not progress) as bar:
        while sum(survived.values()) + sum(len(f["phases"]) for f in failures) < kills:
            # In their order, and some twice: a save or an epoch is killed where it stood.
            phases = [p for p in PHASES for _ in range(rng.choice((0, 1, 1, 2)))]
            folder = work / f"run-{runs}"
            runs += 1
            try:
                phases = survive(folder, cache, phases, rng)
                wrong = differences(result(folder), expected)
            except AssertionError as error:
                wrong = [str(error)]
            if wrong:
                failures.append({"run": folder.name, "phases": phases, "wrong": wrong})
            else:
                survived.update(phases)
            bar.update(len(phases))
    return {
        "kills": sum(survived.values()) + sum(len(f["phases"]) for f in failures),
        "survived": sum(survived.values()),
        "survived_by_phase": {phase: survived[phase] for phase in PHASES},
        "runs": runs,
        "failures": failures,
        "seed": seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        start = time.monotonic()
        found = kill_many(arguments.kills, arguments.seed, Path(work))
        found["wall_seconds"] = round(time.monotonic() - start, 1)
    print(f"{found['survived']} of {found['kills']} kills survived, in {found['runs']} runs:")
    for phase, count in found["survived_by_phase"].items():
        print(f"  {phase:12} {count}")
    for failure in found["failures"]:
        print(f"  FAILED {failure}")
    if arguments.out:
        words = " ".join(["python", "tests/faults/kills.py", *sys.argv[1:]])
        write_json(arguments.out, {**found, "command": words, **environment()})
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
