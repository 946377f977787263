"""What a process of jaxunet's scripts sets up before JAX starts its devices, and says then."""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import platformdirs

from jaxunet.devices import libtpu
from jaxunet.errors import ConfigError
from jaxunet.model import cpu


def _started() -> float:
    """When this process started; where that can't be told, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return time.monotonic() - age


STARTED = _started()
"""By `time.monotonic`: Python's start and what it imported before this count, too."""

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def start() -> None:
    """All of the below; call it before anything asks JAX for a device."""
    open_closed_streams()
    keep_freed_memory()
    use_compilation_cache()
    libtpu.answer_if_absent()


def open_closed_streams() -> None:
    """Open on nothing what this process was started without of stdin, stdout and stderr.

    Else the next file that is opened gets the number of stderr, and what the libraries say
    there is written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 -- it stays open
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 -- it stays open


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation instead of giving it back.

    XLA's CPU backend allocates the temporaries of a step anew each time: 120 MB at width 16,
    128 px and batches of 4. By default glibc maps and unmaps so large a block, and the kernel
    hands out zeroed pages one fault at a time: 29,000 a step, which took 50 of 182 ms
    (AMD EPYC with AVX-512, one core). The process then holds on to its peak.

    Environment variables of glibc (`MALLOC_...`) that are set already are left in charge.

    Returns:
        Whether it was done; other C libraries are left alone.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # In threads' own arenas glibc would map blocks above 64 MiB in spite of M_MMAP_MAX. Steps
    # wait less for two or three arenas than for one, but which thread gets which is chance: in
    # 2 and 6 of 8 processes a step's temporary lay in a thread's, at every step or every other,
    # and all its pages faulted.
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in options.items())


def use_compilation_cache() -> Path | None:
    """Keep compiled programs on disk, so that the next start need not compile them again.

    In the user's cache folder (on Linux `~/.cache/jaxunet/xla`). JAX's own environment
    variables go first: `JAX_COMPILATION_CACHE_DIR` names another place, and
    `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.

    Returns:
        The folder, or None where it is off or cannot be written to.
    """
    settings: Any = jax.config
    if not settings.jax_enable_compilation_cache:
        return None
    if not settings.jax_compilation_cache_dir:
        try:
            folder = platformdirs.user_cache_path("jaxunet") / "xla"
            if not folder.is_absolute():  # no home: `~` as it stands
                return None
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # the latter for a user without a home
            return None
        if not os.access(folder, os.W_OK):
            return None
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: a start runs dozens of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Path(settings.jax_compilation_cache_dir)


def device_error(error: BaseException) -> ConfigError | None:
    """What to tell a user if `error` came of JAX finding no device to start.

    For `JAX_PLATFORMS=cuda` without its plugin JAX raises an AssertionError without a word.
    """
    if not isinstance(error, AssertionError | RuntimeError):
        return None
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as found:
        reason = (str(found).splitlines() or ["it has no plugin for it"])[0]
    else:
        return None
    settings: Any = jax.config
    return ConfigError(
        f"JAX has no device to start: JAX_PLATFORMS is {settings.jax_platforms!r} ({reason}). "
        "Install what drives it (jaxunet's extra [cuda] or [tpu], and the device's driver), "
        "or set JAX_PLATFORMS=cpu."
    )


def say_if_loops_are_off() -> None:
    """One line on stderr where a CPU does without `jaxunet.model.cpu`'s loops, and why."""
    if jax.devices()[0].platform == "cpu" and isinstance(reason := cpu.status(), str):
        print(
            f"note: the CPU's own loops for convolutions are off ({reason}); all are XLA's, "
            "which take longer.",
            file=sys.stderr,
        )
