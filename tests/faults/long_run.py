"""Watch the memory and the open files of a long run: `python tests/faults/long_run.py`.

A tiny model is trained for many steps with evaluations and checkpoints, as `train.py` does
it, in a process that is watched from outside (Linux's /proc).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxunet.devices.environment import environment
from jaxunet.files import write_json
from jaxunet.runs.record import read_metrics

REPOSITORY = Path(__file__).parents[2]
STEPS_PER_EPOCH = 100
MARGIN_MB = 16.0
MARGIN_FILES = 4


def look(pid: int, run: Path) -> dict[str, int]:
    """The process's resident memory in bytes, threads and open files; finished checkpoints."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "checkpoints": len([p for p in (run / "checkpoints").glob("*") if p.name.isdigit()]),
    }


def watch(
    steps: int, work: Path, *, interval: float = 0.5, progress: bool = True
) -> dict[str, Any]:
    """Train for `steps` (a multiple of `STEPS_PER_EPOCH`) and describe what was seen.

    Looks every `interval` seconds, from the first logged line to the last step.

    Returns:
        `samples`, and of each measure its median in the second quarter of them and in the
        last one: in the first one, caches fill.
    """
    options = [
        *("--data.image-size", "16", "--data.synthetic-train", str(4 * STEPS_PER_EPOCH)),
        *("--data.synthetic-validation", "8", "--model.width", "2", "--model.depth", "2"),
        *("--train.epochs", str(steps // STEPS_PER_EPOCH), "--train.batch-size", "4"),
        *("--train.eval-batch-size", "4", "--train.checkpoint-every", "50"),
        *("--data.prepared-dir", str(work / "data"), "--out", str(work / "run")),
    ]
    log = work / "run" / "metrics.jsonl"
    samples: list[dict[str, int]] = []
    with (work / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "experiments" / "train.py"), *options],
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with tqdm(total=steps, unit="step", disable=not progress) as bar:
            while process.poll() is None:
                time.sleep(interval)
                lines = read_metrics(log)
                if lines and lines[-1]["step"] < steps:
                    step = lines[-1]["step"]
                    bar.update(step - bar.n)
                    samples.append({"step": step, **look(process.pid, work / "run")})
    if process.returncode:
        raise AssertionError((work / "output").read_text()[-2000:])
    return {"steps": steps, "options": options[:-4], **describe(samples), "samples": samples}


def describe(samples: list[dict[str, int]]) -> dict[str, Any]:
    quarter = len(samples) // 4
    second, fourth = samples[quarter : 2 * quarter], samples[-quarter:]
    described = {
        name: {
            "second_quarter": statistics.median(s[name] for s in second),
            "last_quarter": statistics.median(s[name] for s in fourth),
            "most": max(s[name] for s in samples),
        }
        for name in ("resident_bytes", "threads", "open_files", "checkpoints")
    }
    memory, files = described["resident_bytes"], described["open_files"]
    grown = (memory["last_quarter"] - memory["second_quarter"]) / 1e6
    more_files = files["last_quarter"] - files["second_quarter"]
    described["flat"] = {
        "memory": grown < MARGIN_MB,
        "memory_grown_mb": round(grown, 3),
        "memory_margin_mb": MARGIN_MB,
        "open_files": abs(more_files) <= MARGIN_FILES,
        # The latest two, the best, and for a moment the one that will be removed.
        "checkpoints": described["checkpoints"]["most"] <= 4,
    }
    return described


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = watch(arguments.steps, Path(work))
    for name in ("resident_bytes", "threads", "open_files", "checkpoints", "flat"):
        print(f"{name}: {found[name]}")
    if arguments.out:
        words = " ".join(["python", "tests/faults/long_run.py", *sys.argv[1:]])
        write_json(arguments.out, {**found, "command": words, **environment()})
    flat = found["flat"]
    return 0 if flat["memory"] and flat["open_files"] and flat["checkpoints"] else 1


if __name__ == "__main__":
    sys.exit(main())
