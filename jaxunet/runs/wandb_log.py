"""A run's log in Weights & Biases, beside its own files: `train.py --log wandb`."""

import importlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxunet.bars import note
from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.errors import ConfigError, RunError, Stopped
from jaxunet.files import write_atomically

ID = "wandb-id.txt"  # in the run directory


def check() -> None:
    """Make sure that a run can be logged; takes a second or two, and asks nobody anything.

    Raises:
        ConfigError: the package is missing, or nothing says who is to be logged in.
    """
    wandb = _package()
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        known, reason = wandb.login(prompt=False, verify=True), "no key was found"
    except wandb.Error as error:
        known, reason = False, _first_line(error)
    if not known:
        raise ConfigError(
            f"--log wandb can't log in ({reason}). Run `wandb login` once, or set "
            "WANDB_API_KEY; WANDB_MODE=offline keeps all in the run directory, for "
            "`wandb sync` later."
        )


def _package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"--log wandb needs the package wandb, which cannot be imported ({error}): "
            "python -m pip install 'jaxunet[wandb]'."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class WandbLog:
    """One wandb run for a run directory, however often it is resumed."""

    def __init__(self, run: Path, config: Config):
        """Begin, or go on with, the wandb run whose id is kept in `run`.

        Its project is `WANDB_PROJECT`, else jaxunet. wandb's own files are in `run`/wandb.

        Raises:
            RunError: wandb won't begin it.
        """
        wandb = _package()
        path = run / ID
        try:
            number = path.read_text().strip() if path.exists() else ""
            if not number:
                number = secrets.token_hex(4)
                write_atomically(path, f"{number}\n")
            self._run = wandb.init(
                id=number,
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "jaxunet"),
                name=run.resolve().name,
                config=to_dict(config),
                allow_val_change=True,  # as of more epochs
                dir=run,
                reinit="create_new",  # and not the one that the process may have already
                # Bars and lines are for the terminal.
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise RunError(
                f"--log wandb could not begin its run ({_first_line(error)}). Leave it out, or "
                "set WANDB_MODE=offline, which keeps all in the run directory."
            ) from error
        # wandb takes no step twice, and a killed run's last ones are done again.
        self._next = int(self._run.starting_step)
        self._works = True

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log `values` by name; those of one step may come one after the other."""
        if step < self._next or not self._works:
            return
        with self._working():
            self._run.log(values, step=step)

    def close(self) -> None:
        """Send what is left; within the handling of an error, but for a stop, as the end of a
        failed run."""
        if not self._works:
            return
        failed = not isinstance(sys.exception(), Stopped | None)
        with self._working():
            self._run.finish(exit_code=int(failed))

    @contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of its process, of the network: not worth the run
            self._works = False
            note(
                "note: wandb takes nothing more of this run "
                f"({type(error).__name__}: {_first_line(error)}); metrics.jsonl has all of it."
            )
