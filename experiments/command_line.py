"""What the scripts share: presets by name, typed options, errors without tracebacks."""

import contextlib
import dataclasses
import difflib
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro
from PIL import Image
from presets import PRESETS
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from jaxunet.config import Config
from jaxunet.devices import distributed
from jaxunet.devices.startup import device_error, start
from jaxunet.errors import ConfigError, JaxUNetError, Stopped
from jaxunet.runs.record import load_config

T = TypeVar("T")


@dataclass(frozen=True)
class OfRun:
    """The options that say from which run the others start."""

    out: Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class Configured(Config):
    """Options of a script, those of a configuration among them."""

    @property
    def config(self) -> Config:
        return Config(self.data, self.model, self.optimizer, self.train)


def parse(kind: type[T], description: str, default: Any = None, args: Any = None) -> T:
    """The command line as an instance of the dataclass `kind`; `--help` explains it.

    A `~` at the start of a path is the user's home folder, wherever in the line it stands.

    Raises:
        ConfigError: a path can't be one on this system.
    """
    given = {} if default is None else {"default": default}
    # No overload of tyro's takes a default that may be left out.
    return _expanded(tyro.cli(kind, description=description, args=args, **given))  # type: ignore[call-overload]


def look_ahead(args: list[str]) -> OfRun:
    """What `args` say of the run that they are about, by the parser that reads the rest."""
    known, _ = tyro.cli(OfRun, args=args, return_unknown_args=True, add_help=False)
    return _expanded(known)


def _expanded(value: Any) -> Any:
    """`value` with the home folder in place of `~` in every path of it."""
    if isinstance(value, Path):
        try:
            str(value).encode()  # as TensorStore takes it, and records are written
            return value.expanduser()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{str(value)!a} cannot be read as {sys.getfilesystemencoding()}, this "
                "system's encoding of file names. Set PYTHONUTF8=1, or rename it in plain "
                "letters."
            ) from error
        except RuntimeError as error:  # of pathlib: nobody's home is known
            raise ConfigError(
                f"{value} starts with ~, but no home folder of that user is known. Give the "
                "whole path."
            ) from error
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        new = {name: _expanded(each) for name, each in old.items()}
        return value if new == old else dataclasses.replace(value, **new)
    return value


def take_preset(args: list[str]) -> tuple[str | None, list[str]]:
    """Split a leading preset, a name or a file, if there is one, from the options after it.

    `--preset PRESET` at the start is the same.

    Raises:
        ConfigError: there is no such preset.
    """
    if args[:1] == ["--preset"]:
        args = args[1:]
    elif args and args[0].startswith("--preset="):
        args = [args[0].partition("=")[2], *args[1:]]
    if not args or args[0].startswith("-"):
        return None, args
    if args[0] not in PRESETS and not _is_record(args[0]):
        near = difflib.get_close_matches(args[0], PRESETS, n=1, cutoff=0)
        raise ConfigError(
            f"There is no preset {args[0]!r}; did you mean {near[0]!r}? "
            f"Presets: {', '.join(PRESETS)}."
        )
    return args[0], args[1:]


def _is_record(name: str) -> bool:
    return name.endswith(".json") or (Path(name) / "config.json").exists()


def preset(name: str) -> Config:
    """The configuration that `name` stands for, or that a run's config.json holds.

    Raises:
        RunError, ConfigError: there is no such file, or it is none of a run.
    """
    if name in PRESETS:
        return PRESETS[name]()
    config = load_config(Path(name).expanduser())
    # How that run was made longer counts its own updates.
    return replace(config, optimizer=replace(config.optimizer, extend=None, extended_at=()))


def print_scores(result: dict[str, Any]) -> None:
    """A table of every score and its interval, headed by what was scored."""
    dataset = result["dataset"]
    count = f"{dataset['count']} images"
    for split, counts in dataset["unofficial_splits"].items():
        count += f"; not the official data: {split} has {counts}"
    table = Table(
        title=f"{dataset['name']} {dataset['split']} ({count}), {dataset['image_size']} px, "
        f"step {result['step']}",
        title_justify="left",
    )
    protocols = result["scores"]
    table.add_column("protocol")
    names = list(protocols["per_image"])
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for protocol, values in protocols.items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in names]
        table.add_row(protocol.replace("_", " "), *cells)
        between = result["intervals"][protocol]
        ranges = (between.get(name, ()) for name in names)
        table.add_row("  95%", *("-".join(f"{end:.3f}" for end in ends) for ends in ranges))
    Console(width=max(100, Console().width)).print(table)
    if found := result.get("calibration"):
        low, high = found["interval"]
        error = found["expected_calibration_error"]
        print(f"expected calibration error {error:.4f} (95% {low:.4f} to {high:.4f})")


def _unraisable(unraisable: Any) -> None:
    """As Python's own, but for what follows a checkpoint that can't be read: Orbax closes its
    event loop on the first array that fails, and the others report to it still."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main`; a user's mistake becomes one paragraph on stderr and exit status 1."""
    # XLA's and TensorFlow's start-up chatter is not for the user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.unraisablehook = _unraisable
    # Of a checkpoint that can't be written, every array would complain by itself.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Such pictures are refused, with a lower limit than Pillow's and by name.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    start()
    status: Any
    try:
        status = main() or 0
        distributed.finish()
    except SystemExit as error:  # `--help`
        status = error.code
    except (Exception, KeyboardInterrupt) as error:
        status = _report(device_error(error) or error)
    if (unwritten := _unwritten()) is not None:
        if status == 0:
            status = _at_output(unwritten)
        # Python itself would fail on what the buffer holds when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _unwritten(more: str = "") -> OSError | None:
    """Why stdout takes no more of what was printed, and `more`; None if all is well."""
    try:
        print(end=more, flush=True)
    except OSError as error:
        return error
    return None


def _at_output(error: OSError) -> int:
    """Say that stdout takes no more; the exit status."""
    if isinstance(error, BrokenPipeError):  # nobody reads it any more, as in `| head`
        return 128 + signal.SIGPIPE
    _say(f"error: what is printed cannot be written: {error.strerror}. Files are whole.")
    return 1


def _report(error: BaseException) -> int:
    """Say what went wrong; the exit status. Raises what is nobody's mistake but ours."""
    # What failed in a print may be gone from the buffer, so something is tried.
    unwritten = _unwritten("\n") if isinstance(error, OSError) else None
    no_space = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in no_space and unwritten is None:
        where = f" for {error.filename}" if error.filename else ""
        error = JaxUNetError(f"{error.strerror}{where}. What was written before is whole.")
    status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, Stopped):  # which all processes are, at the same step
        status = 0 if error.signal is None else 128 + error.signal
    elif distributed.is_joined():
        distributed.fail(error, status)
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
    elif unwritten is not None:
        return _at_output(unwritten)
    elif not isinstance(error, JaxUNetError):
        raise error
    elif distributed.is_main():
        _say(f"error: {error}" if status else str(error))
    distributed.finish()
    return status


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # as of a terminal that was closed: nobody reads it
        tqdm.write(text, file=sys.stderr)  # not on a progress bar
