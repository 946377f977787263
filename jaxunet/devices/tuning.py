"""How XLA chooses among the algorithms of a GPU, and what is kept of its choice.

Before the first step XLA times the algorithms that cuDNN and its own compilers offer for each
convolution and product: most of a start. All here is set through `XLA_FLAGS` before JAX starts
its device, and only where that is an NVIDIA GPU; a CPU and a TPU search for nothing.
"""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import jax
import platformdirs

from jaxunet.config import TrainConfig

LEVELS = {"full": 4, "quick": 2, "none": 0}  # of xla_gpu_autotune_level in XLA's xla.proto
LEVEL = "--xla_gpu_autotune_level"
EXACT = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops=true")
LOAD, DUMP = "--xla_gpu_load_autotune_results_from", "--xla_gpu_dump_autotune_results_to"

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")  # that JAX knows a GPU by

# JAX finds a program that it has compiled before by all flags, these files' names included; so
# they have the same in each process, in a folder of its own that this number is open on.
_NUMBER = 200
_LOADED, _DUMPED = (Path(f"/proc/self/fd/{_NUMBER}/{name}.textproto") for name in ("in", "out"))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Options of every script that runs steps; a CPU and a TPU pay them no heed."""

    tune: Literal["full", "quick", "none"] = "full"
    """On a GPU, how XLA chooses algorithms: `full` times each and checks its result, `quick`
    only times them, `none` takes the first. A shorter search may choose slower ones."""
    deterministic: bool = False
    """On a GPU, only algorithms that give the same bits each time, chosen without timing
    whatever --tune says: equal runs, and a resumed one, are equal. It may be slower; by how
    much is not measured."""


def use(options: Tuning, run: Path | None = None) -> None:
    """Have `options` hold for this process; call it before anything asks JAX for a device.

    What is in `XLA_FLAGS` stays, before what is added. A search begins with the results that
    `run` has kept, else with those in the user's cache folder, and ends there too.

    Args:
        run: directory of the run to train, or whose model to apply.
    """
    if not on_gpu():
        return
    own = (f"{LOAD}={_LOADED}", f"{DUMP}={_DUMPED}")  # of the process that started this one
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in own]
    if options.deterministic:
        flags += EXACT
    elif options.tune != "full":
        flags.append(f"{LEVEL}={LEVELS[options.tune]}")
    if options.deterministic or options.tune != "full":
        # XLA's files by fusion don't say how, or whether, their results were searched for.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    searches = not options.deterministic and options.tune != "none"
    if searches and not any(flag.startswith((LOAD, DUMP)) for flag in flags):
        flags += _open_folder(options.tune, run)
    os.environ["XLA_FLAGS"] = " ".join(flags)


def eval_batch_size(train: TrainConfig) -> int:
    """Images in a global batch of evaluation, on the devices that JAX has started."""
    if train.eval_batch_size is not None:
        return train.eval_batch_size
    # A search is for one shape; that of training's batches is done.
    return train.batch_size if jax.devices()[0].platform == "gpu" else 4


def on_gpu() -> bool:
    """Whether JAX is going to start on an NVIDIA GPU, asked without starting it."""
    settings: Any = jax.config
    wanted = settings.jax_platforms
    if wanted:
        return wanted.split(",")[0] in ("cuda", "gpu")
    return any(map(os.path.exists, DEVICE_FILES)) and any(map(util.find_spec, PLUGINS))


def _open_folder(tune: str, run: Path | None) -> list[str]:
    """The flags that name this process's files of results, the first of them filled."""
    folder = tempfile.mkdtemp(prefix="jaxunet-tuning-")
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.dup2(opened, _NUMBER, inheritable=False)
    os.close(opened)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = f"{_card()}-jaxlib-{metadata.version('jaxlib')}.textproto"
    shared = platformdirs.user_cache_path("jaxunet") / "tuning" / f"{tune}-{name}"
    of_run = run and run / "tuning" / name
    known = next((path for path in (of_run, shared) if path and path.is_file()), None)
    if known != of_run or known is None:  # a run's own are not all that others found
        atexit.register(_replace, shared)
    (Path(folder) / "name").write_text(name)
    if known is None:
        return [f"{DUMP}={_DUMPED}"]
    shutil.copyfile(known, _LOADED)
    return [f"{LOAD}={_LOADED}", f"{DUMP}={_DUMPED}"]


def keep(run: Path) -> None:
    """Leave in `run`/tuning what its steps were compiled with, unless it is there already.

    Where all programs came from JAX's cache nothing was searched for; then it is what a search
    would have begun with.
    """
    if f"{DUMP}={_DUMPED}" in os.environ.get("XLA_FLAGS", "").split():
        name = _DUMPED.with_name("name").read_text()
        if not (run / "tuning" / name).exists():
            _replace(run / "tuning" / name)


def _replace(path: Path) -> None:
    """Put this process's results, if there are any, in the place of `path`."""
    found = next((file for file in (_DUMPED, _LOADED) if file.exists()), None)
    if found is not None:
        with suppress(OSError):  # the next start searches again
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            shutil.copyfile(found, part)
            part.replace(path)


def _card() -> str:
    """The kinds of the GPUs here, as words of a file's name."""
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    found = [re.search(r"^Model:\s*(.*\S)", file.read_text(), re.MULTILINE) for file in files]
    return re.sub(r"\W+", "-", "-".join(sorted({each[1] for each in found if each}))) or "gpu"


def record() -> dict[str, Any]:
    """What holds in this process, as `XLA_FLAGS` says; of a flag given twice the last."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = dict(flag.partition("=")[::2] for flag in flags)
    deterministic = given.get("--xla_gpu_deterministic_ops") in ("true", "1", "")
    level = "0" if deterministic else given.get(LEVEL, str(LEVELS["full"]))
    named = {str(number): name for name, number in LEVELS.items()}
    return {
        "tune": named.get(level, f"level {level}"),
        "deterministic": deterministic,
        "results_loaded": LOAD in given,
        "xla_flags": flags,
    }


def recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run's config.json names, so that the run goes on with them."""
    found = record.get("tuning")
    if not isinstance(found, dict):  # made on a CPU or a TPU, or before it was recorded
        return {}
    options = {"deterministic": found.get("deterministic") is True}
    return options | ({"tune": found["tune"]} if found.get("tune") in LEVELS else {})
