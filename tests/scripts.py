"""Running the scripts as a person does: in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "experiments"
# XLA compiles in half the time, without optimisation and in one piece.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
SMALL = [
    *("--data.image-size", "16", "--data.synthetic-train", "24"),
    *("--data.synthetic-validation", "6", "--model.width", "4", "--model.depth", "2"),
    *("--train.epochs", "2", "--train.log-every", "1", "--optimizer.warmup-steps", "0"),
]


def command(script: str, *words: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *map(str, words)]


def environment() -> dict[str, str]:
    """One device, and programs that are compiled fast."""
    return {
        **os.environ,
        "XLA_FLAGS": FAST_COMPILE,
        "COLUMNS": "100",
    }


def run(script: str, *words: object, expect: int = 0) -> str:
    done = subprocess.run(
        command(script, *words), capture_output=True, text=True, env=environment()
    )
    output = done.stdout + done.stderr
    assert done.returncode == expect, output
    assert "Traceback" not in output
    return output
