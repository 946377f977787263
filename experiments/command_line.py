"""What the scripts share: presets by name, typed options, errors without tracebacks."""

import difflib
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import IO, Any, TypeVar

import tyro
from PIL import Image
from presets import PRESETS
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from jaxunet import distributed
from jaxunet.config import Config
from jaxunet.errors import ConfigError, JaxUNetError, Stopped
from jaxunet.startup import device_error, start

T = TypeVar("T")


def parse(kind: type[T], description: str, default: Any = None, args: Any = None) -> T:
    """The command line as an instance of the dataclass `kind`; `--help` explains it."""
    given = {} if default is None else {"default": default}
    # No overload of tyro's takes a default that may be left out.
    return tyro.cli(kind, description=description, args=args, **given)  # type: ignore[call-overload]


def take_preset(args: list[str]) -> tuple[str | None, list[str]]:
    """Split a leading preset name, if there is one, from the options after it.

    Raises:
        ConfigError: there is no such preset.
    """
    if not args or args[0].startswith("-"):
        return None, args
    if args[0] not in PRESETS:
        near = difflib.get_close_matches(args[0], PRESETS, n=1, cutoff=0)
        raise ConfigError(
            f"There is no preset {args[0]!r}; did you mean {near[0]!r}? "
            f"Presets: {', '.join(PRESETS)}."
        )
    return args[0], args[1:]


def preset(name: str) -> Config:
    """The configuration that `name` stands for."""
    return PRESETS[name]()


def print_scores(result: dict[str, Any]) -> None:
    """A table of every score under every protocol, headed by what was scored."""
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
    Console(width=max(100, Console().width)).print(table)


def _unraisable(unraisable: Any) -> None:
    """As Python's own, but for what follows a checkpoint that can't be read: Orbax closes its
    event loop on the first array that fails, and the others report to it still."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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
    if _is_closed(sys.stdout, ""):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 128 + signal.SIGPIPE
    sys.exit(status)


def _is_closed(stream: IO[str], text: str) -> bool:
    """Whether nobody reads the pipe `stream` any more, as in `| head`; else write `text`."""
    try:
        print(text, end="", file=stream, flush=True)
    except BrokenPipeError:
        return True
    return False


def _report(error: BaseException) -> int:
    """Say what went wrong; the exit status. Raises what is nobody's mistake but ours."""
    if isinstance(error, OSError) and _is_full(error):
        where = f" for {error.filename}" if error.filename else ""
        error = JaxUNetError(f"{error.strerror}{where}. What was written before is whole.")
    status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, Stopped):  # which all processes are, at the same step
        status = 128 + error.signal
    elif distributed.is_joined():
        distributed.fail(error, status)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, BrokenPipeError) and _is_closed(sys.stdout, "\n"):
        return 128 + signal.SIGPIPE
    elif not isinstance(error, JaxUNetError):
        raise error
    elif distributed.is_main():
        tqdm.write(f"error: {error}", file=sys.stderr)  # not on a progress bar
    distributed.finish()
    return status
