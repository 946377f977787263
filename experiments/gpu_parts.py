"""The parts of the programme for a GPU: what each runs, with what limit."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent

Name = Literal[
    "race",
    "start-full",
    "start-again",
    "start-quick",
    "start-none",
    "tf32-off",
    "tests",
    "deterministic",
    "deterministic-again",
    "training",
    "reproduction",
    "race-larger",
]


@dataclass(frozen=True)
class Part:
    """One command, and how many seconds it may take."""

    name: str
    limit: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    cache: str = "shared"
    """Of those with the same, a later one finds the programs and algorithms of an earlier."""


def parts(results: Path, data_dir: Path | None = None, *, quick: bool = False) -> list[Part]:
    """All parts that can run, in order; they write into `results`.

    Limits are a third above what the first run on an H100 gives to expect: 15 s to start
    Python with JAX and PyTorch, 45 s to compile a first train step at full size (its
    convolutions searched for), 5 s for each like it, 30 s for a form of PyTorch with its
    rounds, 165 s for a seed of the reproduction.
    """
    synthetic: tuple[object, ...] = ("--data.name", "synthetic")

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

    def reproduce(name: Name, data: Sequence[object], *words: object) -> list[str]:
        if quick:
            data = (*synthetic, "--data.image-size", 16, "--model.width", 2)
            data += ("--model.depth", 2, "--data.synthetic-train", 16)
            data += ("--data.synthetic-validation", 4, "--train.epochs", 1)
        return script("reproduce.py", name, *data, "--data.cache", "device", *words)

    def environment_of(part: Part) -> dict[str, str]:
        prepared = os.environ.get("TFDS_DATA_DIR", str(results.parent / "prepared"))
        # A fresh cache folder would have Matplotlib look for the fonts anew.
        found = {"TFDS_DATA_DIR": prepared, "MPLCONFIGDIR": str(results.parent / "fonts")}
        if quick:  # what takes longest on a CPU is PyTorch's compiler, and then XLA's
            found |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
            flags = os.environ.get("XLA_FLAGS", "")
            found["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
            found["JAX_COMPILATION_CACHE_DIR"] = str(results.parent / "programs")
            found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            if "benchmark.py" in part.command[1]:  # which compiles in another process, if on
                found["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        found["XDG_CACHE_HOME"] = str(results.parent / "cache" / part.cache)
        return found | part.environment

    tests = ["tests/interop/test_parity.py", "tests/model", "tests/learning"]
    tests += ["tests/devices/test_parallel.py", "tests/devices/test_tuning.py"]
    if quick:
        tests = ["tests/data/test_sampler.py"]
    isic = ("--data.dir", data_dir and data_dir.resolve())
    train = ("--measure", "train")
    pytorch = ("--against", "pytorch")
    profile = ("--profile", results / "profile")
    # 250 steps of 8, whose losses are compared from process to process.
    data = (*synthetic, "--data.synthetic-train", 1000, "--data.synthetic-validation", 16)
    twice = (data, "--train.epochs", 1 if quick else 2, "--deterministic")
    found = [
        Part("race", 260, benchmark("race", *train, *pytorch, *profile)),
        Part("start-full", 90, benchmark("start-full", *train, "--tune", "full"), cache="a"),
        Part("start-again", 50, benchmark("start-again", *train, "--tune", "full"), cache="a"),
        Part("start-quick", 80, benchmark("start-quick", *train, "--tune", "quick"), cache="b"),
        Part("start-none", 50, benchmark("start-none", *train, "--tune", "none"), cache="c"),
        # 300 steps: without TF32 each takes some three times as long.
        Part(
            "tf32-off",
            170,
            reproduce(
                *("tf32-off", isic, *pytorch, "--no-tf32", "--train.epochs", 1 if quick else 2),
                *("--data.train-split", "train[:8]" if quick else "train[:1200]"),
            ),
        ),
        # In float32 the tensor cores' TF32 would round to three digits, and to search for each
        # small program's algorithms took more than 110 s. The last ones start scripts.
        Part(
            "tests",
            300,
            [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests],
            {
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
                "NVIDIA_TF32_OVERRIDE": "0",
            },
        ),
        Part("deterministic", 90, reproduce("deterministic", *twice), cache="d"),
        Part("deterministic-again", 90, reproduce("deterministic-again", *twice), cache="e"),
        Part("training", 120, benchmark("training", "--measure", "training")),
        Part("reproduction", 440, reproduce("reproduction", isic, *pytorch, "--seeds", 1, 2)),
        Part(
            "race-larger",
            180,
            benchmark(
                *("race-larger", *train, *pytorch, "--forms", "compile_channels_last"),
                *("--sweep.batch-size", *((8,) if quick else (64, 128))),
            ),
        ),
    ]
    return [
        replace(
            part,
            environment=environment_of(part),
            limit=120 if quick else part.limit,  # where nothing is measured, and all is shared
        )
        for part in found
        if quick or data_dir is not None or "--data.dir" not in part.command
    ]
