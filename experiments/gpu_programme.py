"""All that only a GPU can show, in nine minutes: `python experiments/gpu_programme.py`."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from command_line import parse, run_script

from jaxunet.devices.environment import command_line, environment
from jaxunet.errors import ConfigError
from jaxunet.files import check_writable, write_json
from jaxunet.ranges import require_positive

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Arguments:
    data_dir: Path | None = None
    """ISIC 2018 data for the reproduction (none: it is left out)."""
    out: Path = field(default_factory=lambda: Path("experiments/results"))
    """Folder for gpu-*.json and gpu-*.png."""
    minutes: float = 9.0
    """What is not done by then is stopped; what was measured stays."""
    quick: bool = False
    """Tiny sizes, on any device: to try the programme itself."""

    def __post_init__(self) -> None:
        require_positive("--minutes", self.minutes)


@dataclass(frozen=True)
class Part:
    """One command, with the longest it may take of the whole time."""

    name: str
    command: list[str]
    share: float
    environment: dict[str, str] = field(default_factory=dict)


def resolved(arguments: Arguments) -> Arguments:
    """With absolute paths: parts run in the repository, wherever the programme was started."""
    data_dir = arguments.data_dir and arguments.data_dir.resolve()
    return replace(arguments, data_dir=data_dir, out=arguments.out.resolve())


def parts(arguments: Arguments) -> list[Part]:
    def script(name: str, *words: object) -> list[str]:
        return [sys.executable, str(HERE / name), *map(str, words), "--out", str(arguments.out)]

    tiny = ["--model.width", "4", "--model.depth", "2", "--data.image-size", "16"]
    shape = tiny if arguments.quick else ["--model.width", "64", "--data.image-size", "256"]
    timing = ["--rounds", "2", "--seconds", "0.01"] if arguments.quick else ["--seconds", "0.5"]
    steps = [*shape, *timing, "--measure", "train"]
    batches = ("2", "4") if arguments.quick else ("32", "128")
    tests = [
        "tests/interop/test_parity.py",
        "tests/devices/test_parallel.py",
        "tests/model/test_unet.py",
    ]
    found = [
        Part(
            "throughput-bfloat16",
            script(
                "benchmark.py",
                *steps,
                *("--model.dtype", "bfloat16", "--against", "pytorch"),
                *("--sweep.batch-size", *batches, "--name", "gpu-throughput-bfloat16"),
            ),
            0.35,
        ),
        Part(
            "throughput-float32",
            script(
                "benchmark.py",
                *(*steps, "training", "--against", "pytorch"),
                *("--train.batch-size", "8", "--name", "gpu-throughput-float32"),
            ),
            0.25,
        ),
        Part(
            "tests",
            [sys.executable, "-m", "pytest", "-x", *(tests[2:] if arguments.quick else tests)],
            0.4,
            # In float32 the tensor cores' TF32 would round to three digits.
            {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "NVIDIA_TF32_OVERRIDE": "0"},
        ),
    ]
    if arguments.data_dir is not None:
        words = [
            "--data.dir",
            arguments.data_dir.absolute(),
            "--against",
            "pytorch",
            "--seeds",
            0,
            1,
            2,
        ]
        words += ["--data.cache", "device", "--name", "gpu-reproduction"]
        found.insert(2, Part("reproduction", script("reproduce.py", *words), 1.0))
    return found


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Run one command for at most `seconds`; interrupted, it keeps what it has written."""
    print(f"== {part.name} (at most {seconds:.0f} s): {' '.join(part.command[1:])}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(part.command, cwd=ROOT, env={**os.environ, **part.environment})
    try:
        status: int | None = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        status = None
    return {"seconds": time.perf_counter() - start, "exit_status": status}


def main() -> int:
    arguments = parse(Arguments, "Throughput against PyTorch, parity and reproduction.")
    if arguments.data_dir is not None and not arguments.data_dir.is_dir():
        raise ConfigError(f"--data-dir is {arguments.data_dir}, which is not a folder.")
    check_writable(arguments.out, "--out")
    arguments = resolved(arguments)
    record: dict[str, Any] = {"command": command_line(), **environment()}
    if record["devices"]["platform"] != "gpu" and not arguments.quick:
        raise ConfigError(
            f"JAX sees no GPU but {record['devices']['kind']!r}. Install the extra [cuda], or "
            "try the programme itself with --quick."
        )
    end = time.perf_counter() + 60 * arguments.minutes
    done: dict[str, Any] = {}
    for part in parts(arguments):
        left = end - time.perf_counter()
        done[part.name] = run_part(part, min(left, 60 * arguments.minutes * part.share))
        write_json(arguments.out / "gpu-programme.json", {**record, "parts": done})
    failed = [name for name, each in done.items() if each["exit_status"] != 0]
    print(f"Written: {arguments.out}/gpu-*.json" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
