"""What only a GPU can show, part by part: `gpu_programme.py --out DIR [--data-dir ISIC2018]`.

The parts are independent, the most telling first. Each has a limit of its own, and writes into
a folder that is packed again every few seconds. So a cut keeps what there was: in DIR lie
`gpu-programme.json` (what ran, what failed and with which last line) and `gpu-results.tgz`
(results, figures and the log of each part).
"""

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from command_line import parse, run_script

from jaxunet.bench.card import card, share_memory
from jaxunet.config import require_positive
from jaxunet.devices.environment import command_line, environment
from jaxunet.errors import ConfigError
from jaxunet.files import check_writable, write_json

HERE = Path(__file__).parent
ROOT = HERE.parent
PACK_EVERY = 5.0  # seconds

Name = Literal[
    "race",
    "start-none",
    "start-quick",
    "tf32-off",
    "tests",
    "training",
    "reproduction",
    "race-larger",
]


@dataclass(frozen=True)
class Arguments:
    data_dir: Path | None = None
    """ISIC 2018 data, for the parts that train on them."""
    out: Path = field(default_factory=lambda: Path("gpu"))
    """Folder for gpu-programme.json and gpu-results.tgz."""
    only: tuple[Name, ...] = ()
    """Parts to run (all, if none is named)."""
    minutes: float = 9.0
    """What is not done by then is stopped; what was measured stays."""
    quick: bool = False
    """Tiny sizes, on any device: to try the programme itself."""

    def __post_init__(self) -> None:
        require_positive("--minutes", self.minutes)


@dataclass(frozen=True)
class Part:
    """One command, and how many seconds it may take."""

    name: str
    limit: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def parts(arguments: Arguments, results: Path) -> list[Part]:
    """All parts that can run, in order; they write into `results`.

    Limits are a third above what the first run on an H100 gives to expect: 15 s to start
    Python with JAX and PyTorch, 45 s to compile a first train step at full size (its
    convolutions searched for), 5 s for each like it, 30 s for a form of PyTorch with its
    rounds, 165 s for a seed of the reproduction.
    """
    quick, data_dir = arguments.quick, arguments.data_dir

    def script(script: str, name: Name, *words: object) -> list[str]:
        options = ("--out", results, "--name", f"gpu-{name}")
        return [sys.executable, str(HERE / script), *map(str, (*words, *options))]

    def benchmark(name: Name, *words: object, batch_size: int = 32) -> list[str]:
        size: tuple[object, ...] = ("--model.width", 64, "--data.image-size", 256)
        size += ("--rounds", 6, "--seconds", 0.5)
        if quick:
            size = ("--model.width", 2, "--data.image-size", 16, "--rounds", 2)
            size += ("--model.depth", 2, "--seconds", 0.01, "--data.synthetic-train", 8)
            batch_size = 4
        size += ("--train.batch-size", batch_size, "--model.dtype", "bfloat16")
        return script("benchmark.py", name, *size, *words)

    def environment_of(part: Part) -> dict[str, str]:
        prepared = os.environ.get("TFDS_DATA_DIR", str(results.parent / "prepared"))
        found = {"TFDS_DATA_DIR": prepared, "XLA_FLAGS": flags}
        if quick:  # what takes longest on a CPU is PyTorch's compiler, and then XLA's
            found |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
            found["JAX_COMPILATION_CACHE_DIR"] = str(results.parent / "programs")
            found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            if "benchmark.py" in part.command[1]:  # which compiles in another process, if on
                found["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return found | part.environment

    def reproduce(name: Name, *words: object) -> list[str]:
        data: tuple[object, ...] = ("--data.dir", data_dir and data_dir.resolve())
        if quick:
            data = ("--data.name", "synthetic", "--data.image-size", 16, "--model.width", 2)
            data += ("--model.depth", 2, "--data.synthetic-train", 16)
            data += ("--data.synthetic-validation", 4)
        always = ("--against", "pytorch", "--data.cache", "device")
        return script("reproduce.py", name, *data, *always, *words)

    flags = os.environ.get("XLA_FLAGS", "")
    if quick:
        flags += " --xla_backend_optimization_level=0"
    tests = ["tests/interop/test_parity.py", "tests/model", "tests/learning"]
    tests += ["tests/devices/test_parallel.py"]
    if quick:
        tests = ["tests/data/test_sampler.py"]

    def tuned(level: int) -> dict[str, str]:
        """How far XLA searches for algorithms: not at all (0), or without checks (2)."""
        return {"XLA_FLAGS": f"{flags} --xla_gpu_autotune_level={level}"}

    train = ("--measure", "train")
    profile = ("--profile", results / "profile")
    found = [
        Part("race", 260, benchmark("race", *train, "--against", "pytorch", *profile)),
        Part("start-none", 50, benchmark("start-none", *train), tuned(0)),
        Part("start-quick", 80, benchmark("start-quick", *train), tuned(2)),
        # 300 steps: without TF32 each takes some three times as long.
        Part(
            "tf32-off",
            170,
            reproduce(
                *("tf32-off", "--no-tf32", "--train.epochs", 2),
                *("--data.train-split", "train[:8]" if quick else "train[:1200]"),
            ),
        ),
        # In float32 the tensor cores' TF32 would round to three digits, and to search for each
        # small program's algorithms took more than 110 s.
        Part(
            "tests",
            150,
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
            {
                **tuned(0),
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
                "NVIDIA_TF32_OVERRIDE": "0",
            },
        ),
        Part("training", 120, benchmark("training", "--measure", "training")),
        Part("reproduction", 440, reproduce("reproduction", "--seeds", 1, 2)),
        Part(
            "race-larger",
            180,
            benchmark(
                *("race-larger", *train, "--against", "pytorch"),
                *("--forms", "compile_channels_last", "--sweep.batch-size"),
                *((8,) if quick else (64, 128)),
            ),
        ),
    ]
    return [
        replace(part, environment=environment_of(part))
        for part in found
        if quick or data_dir is not None or "reproduce.py" not in part.command[1]
    ]


def run_part(part: Part, seconds: float, log: Path, keep: Callable[[], None]) -> dict[str, Any]:
    """Run one command for at most `seconds`, with `keep` called every few of them.

    Returns:
        `outcome` ("done", "failed" or "cut"), `seconds`, `limit`, `exit_status` and the
        `last_line` of what it said.
    """
    print(f"== {part.name} (at most {seconds:.0f} s): {' '.join(part.command[1:])}", flush=True)
    start = time.perf_counter()
    status: int | None = None
    with log.open("w") as said:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while status is None and (left := start + seconds - time.perf_counter()) > 0:
                try:
                    status = process.wait(timeout=min(left, PACK_EVERY))
                except subprocess.TimeoutExpired:
                    keep()
        finally:
            if status is None:
                _end(process)
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    found = {
        "outcome": "cut" if status is None else "failed" if status else "done",
        "seconds": round(time.perf_counter() - start, 1),
        "limit": round(seconds, 1),
        "exit_status": status,
        "last_line": next((line for line in reversed(lines) if line.strip()), "")[:300],
    }
    print(f"   {found['outcome']} after {found['seconds']} s: {found['last_line']}", flush=True)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started, what outlives it too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def pack(folder: Path, archive: Path) -> None:
    """Everything in `folder`; the archive before it stays until the new one is whole."""
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:gz") as tar:
        tar.add(folder, arcname=".")
    part.replace(archive)


def run_programme(chosen: list[Part], arguments: Arguments, record: dict[str, Any]) -> bool:
    """Run the parts, one after the other; whether all were done.

    Args:
        record: the summary, which gets an entry for each part.
    """
    end = time.perf_counter() + 60 * arguments.minutes
    results = Path(record["folder"])
    done = record["parts"] = {part.name: {"outcome": "not begun"} for part in chosen}

    def keep() -> None:
        write_json(arguments.out / "gpu-programme.json", record)
        pack(results, arguments.out / "gpu-results.tgz")

    try:
        for part in chosen:
            left = end - time.perf_counter()
            if left < part.limit / 2:
                done[part.name] = {"outcome": f"not begun: {left:.0f} s were left"}
                continue
            done[part.name] = {"outcome": "cut with the programme"}  # unless it ends
            log = results / f"{part.name}.log"
            done[part.name] = run_part(part, min(left, part.limit), log, keep)
            keep()
    finally:
        keep()
    return all(each["outcome"] == "done" for each in done.values())


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    arguments = parse(Arguments, "All that only a GPU can show.")
    if arguments.data_dir is not None and not arguments.data_dir.is_dir():
        raise ConfigError(f"--data-dir is {arguments.data_dir}, which is not a folder.")
    check_writable(arguments.out, "--out")
    share_memory()  # with the parts, too
    record: dict[str, Any] = {"command": command_line(), "card": card(), **environment("torch")}
    if record["devices"]["platform"] != "gpu" and not arguments.quick:
        raise ConfigError(
            f"JAX sees no GPU but {record['devices']['kind']!r}. Install the extra [cuda], or "
            "try the programme itself with --quick."
        )
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.mkdir()
        found = parts(arguments, results)
        missing = set(arguments.only) - {part.name for part in found}
        if missing:
            raise ConfigError(
                f"--only names {', '.join(sorted(missing))}, which trains on ISIC 2018: give "
                "--data-dir."
            )
        chosen = [p for p in found if not arguments.only or p.name in arguments.only]
        record["folder"] = str(results)
        complete = run_programme(chosen, arguments, record)
    for name, part in record["parts"].items():
        print(f"{name:14} {part['outcome']:8} {part.get('last_line', '')[:100]}")
    print(f"Written: {arguments.out}/gpu-programme.json and gpu-results.tgz")
    return 0 if complete else 1


if __name__ == "__main__":
    run_script(main)
