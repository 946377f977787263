"""How XLA chooses among the algorithms of a GPU, and what is kept of its choice.

Before the first step XLA times the algorithms that cuDNN and its own compilers offer for each
convolution and product: most of a start. All here is set through `XLA_FLAGS` before JAX starts
its device, and only where that is an NVIDIA GPU; a CPU and a TPU search for nothing.
"""

import atexit
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import jax
import platformdirs

from jaxunet.config import TrainConfig
from jaxunet.devices import algorithms

Level = Literal["full", "quick", "none"]
LEVELS: dict[str, int] = {"full": 4, "quick": 2, "none": 0}  # of XLA's xla_gpu_autotune_level
LEVEL = "--xla_gpu_autotune_level"
EXACT = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops=true")
LOAD, DUMP = "--xla_gpu_load_autotune_results_from", "--xla_gpu_dump_autotune_results_to"

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")  # that JAX knows a GPU by

# JAX finds a program that it has compiled before by all flags, these files' names included. So
# these name each process's own folder by a number that is open on it, the same in each; and
# the file that is loaded by what is in it, as other results make another program.
_NUMBER = 200
_FOLDER = Path(f"/proc/self/fd/{_NUMBER}")
_DUMPED = _FOLDER / "found.textproto"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Options of every script that runs steps; a CPU and a TPU pay them no heed."""

    tune: Level | None = None
    """On a GPU, how XLA chooses algorithms: `full` times each and checks its result, `quick`
    only times them, `none` takes the first. A shorter search may choose slower ones. (None
    given: as the run began that is gone on with or used, else `full`.)"""
    deterministic: bool = False
    """On a GPU, only algorithms that give the same bits each time, chosen without timing
    whatever --tune says: equal runs, and a resumed one, are equal. It may be slower; by how
    much is not measured. A run that began so stays so."""


@dataclass(frozen=True)
class _Search:
    """Where the results of this process's search lie, and how a kept file of them is named."""

    name: str
    loaded: Path | None

    def results(self) -> str | None:
        """What it found, with what it began with; where nothing was searched for, as all
        programs came from JAX's cache, that alone."""
        places = (_DUMPED, self.loaded) if self.loaded else (_DUMPED,)
        return next(filter(None, map(algorithms.read, places)), None)


_search: _Search | None = None  # of this process


def use(
    options: Tuning,
    run: Path | None = None,
    recorded: Mapping[str, Any] | None = None,
    *,
    several: bool = False,
) -> None:
    """Have `options` hold for this process; call it before anything asks JAX for a device.

    What is in `XLA_FLAGS` stays, before what is added. A search begins with the results that
    `run` has kept, else with those in the user's cache folder, and is added to these.

    Args:
        run: directory of the run to train, or whose model to apply.
        recorded: what `record` gave when it began.
        several: this is one of several processes. They share out a search, so that none may
            know more than the others: nothing is kept of it.
    """
    global _search
    if not on_gpu():
        return
    recorded = recorded or {}
    tune = options.tune or (recorded.get("tune") in LEVELS and recorded["tune"]) or "full"
    deterministic = options.deterministic or recorded.get("deterministic") is True
    flags = [  # but not those of the process that started this one
        flag for flag in os.environ.get("XLA_FLAGS", "").split() if f"={_FOLDER}/" not in flag
    ]
    if deterministic:
        flags += EXACT
    elif tune != "full":
        flags.append(f"{LEVEL}={LEVELS[tune]}")
    if deterministic or tune != "full":
        # XLA's files by fusion don't say how, or whether, their results were searched for.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    held, deterministic = _chosen(flags)  # with what is in the user's own XLA_FLAGS
    searches = held in ("full", "quick") and not deterministic and not several
    if searches and not any(flag.startswith((LOAD, DUMP)) for flag in flags):
        _search = _begin(held, run)
        loaded = _search.loaded
        flags += [f"{LOAD}={loaded}"] * (loaded is not None) + [f"{DUMP}={_DUMPED}"]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def eval_batch_size(train: TrainConfig) -> int:
    """Images in a global batch of evaluation, on the devices that JAX has started."""
    if train.eval_batch_size is not None:
        return train.eval_batch_size
    # A search is for one shape; that of training's batches is done.
    whole = train.microbatch or train.batch_size
    return whole if jax.devices()[0].platform == "gpu" else 4


def on_gpu() -> bool:
    """Whether JAX is going to start on an NVIDIA GPU, asked without starting it."""
    settings: Any = jax.config
    wanted = settings.jax_platforms
    if wanted:
        return wanted.split(",")[0] in ("cuda", "gpu")
    return any(map(os.path.exists, DEVICE_FILES)) and any(map(util.find_spec, PLUGINS))


def _begin(tune: str, run: Path | None) -> _Search:
    """Open this process's folder, with the results in it that its search begins with."""
    folder = tempfile.mkdtemp(prefix="jaxunet-tuning-")
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.dup2(opened, _NUMBER, inheritable=False)
    os.close(opened)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = f"{_card()}-jaxlib-{metadata.version('jaxlib')}.textproto"
    places = [run / "tuning" / name] if run else []
    try:
        shared = platformdirs.user_cache_path("jaxunet") / "tuning" / f"{tune}-{name}"
    except RuntimeError:  # a user without a home
        shared = None
    if shared is not None and shared.is_absolute():
        places.append(shared)
        atexit.register(_keep_in, shared)  # before the folder is removed
    known = next(filter(None, map(algorithms.read, places)), None)
    loaded = None
    if known is not None:
        loaded = _FOLDER / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.textproto"
        loaded.write_text(known)
    return _Search(name, loaded)


def keep(run: Path) -> None:
    """Add to `run`/tuning what its steps were compiled with; what is there stays as it is."""
    if _search is not None:
        _keep_in(run / "tuning" / _search.name)


def _keep_in(path: Path) -> None:
    found = _search and _search.results()
    if found:
        algorithms.add(path, found)


def _card() -> str:
    """The kinds of the GPUs here, as words of a file's name."""
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    found = [re.search(r"^Model:\s*(.*\S)", file.read_text(), re.MULTILINE) for file in files]
    return re.sub(r"\W+", "-", "-".join(sorted({each[1] for each in found if each}))) or "gpu"


def _chosen(flags: list[str]) -> tuple[str, bool]:
    """The level of the search that `flags` ask for, by name, and whether bits repeat."""
    given = dict(flag.partition("=")[::2] for flag in flags)
    deterministic = given.get("--xla_gpu_deterministic_ops") in ("true", "1", "")
    level = "0" if deterministic else given.get(LEVEL, str(LEVELS["full"]))
    named = {str(number): name for name, number in LEVELS.items()}
    return named.get(level, f"level {level}"), deterministic


def record() -> dict[str, Any]:
    """What holds in this process, as `XLA_FLAGS` says; of a flag given twice the last."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    tune, deterministic = _chosen(flags)
    return {
        "tune": tune,
        "deterministic": deterministic,
        "equal_runs": "the same bits, on the same kind of card with the same versions"
        if deterministic
        else "differ in rounding: another process may choose other algorithms, and some "
        "kernels add in any order (--deterministic: the same bits)",
        "results_loaded": any(flag.startswith(LOAD) for flag in flags),
        "xla_flags": flags,
    }
