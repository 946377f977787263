"""Options of every script that applies trained runs, and the model that they ask for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import jax

from jaxunet.config import DataConfig
from jaxunet.devices import tuning
from jaxunet.devices.strategies import Strategy, make_strategy
from jaxunet.errors import ConfigError, RunError
from jaxunet.learning.views import Views
from jaxunet.runs.calibration import Auto, settle
from jaxunet.runs.loading import TrainedModel, load
from jaxunet.runs.record import recorded_tuning


@dataclass(frozen=True, kw_only=True)
class RunOptions(tuning.Tuning):
    """Which weights of runs are made use of."""

    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint: the last one, or the best on the validation split."""

    def use_tuning(self, runs: Sequence[Path], *, several: bool = False) -> None:
        """`tuning.use` as the runs began: with equal bits if one of them has them."""
        began = [recorded_tuning(run) for run in runs]
        exact = any(each.get("deterministic") is True for each in began)
        tuning.use(self, runs[0], {**began[0], "deterministic": exact}, several=several)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RunOptions):
    """How runs are made use of."""

    views: Views = "none"
    """Average probabilities over a picture's four flips, or its eight turns (d4)."""
    threshold: float | Auto | None = None
    """Probability above which a pixel is lesion; auto: the one with the highest Dice on the
    run's own validation split, kept in the run (none: the run's train.threshold)."""
    temperature: float | Auto = 1.0
    """Divide logits by this before they become probabilities; auto: the one with the least
    cross-entropy on the run's own validation split, kept in the run (1: as they are)."""
    clean: bool = False
    """Fill holes of masks and keep the largest region only."""

    def load(
        self,
        runs: Path | Sequence[Path],
        strategy: Strategy,
        *,
        data: DataConfig | None = None,
        show_progress: bool = True,
    ) -> TrainedModel:
        """The model of `runs`, of several an ensemble, as these options have it.

        Args:
            data: where the runs' data may be now, for what is `auto`.
        """
        return settle(
            load(runs, self.checkpoint, self.views),
            strategy,
            threshold=self.threshold,
            temperature=self.temperature,
            data=data,
            show_progress=show_progress,
        )

    def load_to_export(self, run: Path) -> TrainedModel:
        """The model of `run` as a program without masks.

        Raises:
            ConfigError: they are to be cleaned up.
        """
        if self.clean:
            raise ConfigError(
                "--clean is no part of a network: it looks for regions of the finished mask. "
                "Leave it out, and clean masks up after it."
            )
        return self.load(run, make_strategy("jit", jax.local_devices()[:1]))

    def described(self, model: TrainedModel) -> dict[str, Any]:
        """What a result says of the model that it is of."""
        return {
            "runs": [member.described() for member in model.members],
            "views": self.views,
            "threshold": model.recipe.threshold,
            "temperature": model.recipe.temperature,
            "clean": self.clean,
            "fitted_on_validation": [
                name for name in ("threshold", "temperature") if getattr(self, name) == "auto"
            ],
        }

    def file_name(self, split: str, *, native: bool = False, other: str | None = None) -> str:
        """What the results are called: another name for all that may give other scores.

        `[native-][DATASET-]SPLIT[-best][-VIEWS][-threshold-T][-temperature-T][-clean]`, with
        DATASET where it is not the run's own, and of a slice `_` for its bracket and `.` for
        its colon: `test[:10%]` is `test_.10%`.
        """
        slices = split.replace(" ", "").translate(
            {ord("["): "_", ord(":"): ".", ord("]"): None}
        )
        parts = (
            "native" if native else "",
            other,
            quote(slices, "%+"),
            "best" if self.checkpoint == "best" else "",
            "" if self.views == "none" else self.views,
            "" if self.threshold is None else f"threshold-{self.threshold}",
            "" if self.temperature == 1 else f"temperature-{self.temperature}",
            "clean" if self.clean else "",
        )
        return "-".join(filter(None, parts))


def needs_out(runs: Sequence[Path], out: Path | None) -> Path:
    """Where results go: `out`, or the one run that they are of.

    Raises:
        ConfigError: they are of several runs together, and there is no `out`.
    """
    if out is None and len(runs) > 1:
        raise ConfigError(
            f"Results of {len(runs)} runs together ({', '.join(map(str, runs))}) belong into "
            "none of them: give --out a folder."
        )
    return out or runs[0]


def check_replaces(path: Path, what: str, here: str, read: Callable[[Any], str]) -> None:
    """Scores of some data, or of some runs, are not put in place of others'.

    Args:
        what, here: what must be equal, in a word, and what it is now.
        read: the same, from what is in `path`.

    Raises:
        RunError: `path` holds scores of another one.
    """
    if path.exists():
        try:
            before = read(json.loads(path.read_bytes()))
        except (ValueError, LookupError, TypeError):
            before = "unknown"
        if before != here:
            raise RunError(
                f"{path} holds the scores of other {what} ({before}; these are of {here}). "
                "Move it away, or give --out another folder."
            )


def runs_of(result: Any) -> str:
    return ", ".join(each["run"] for each in result["runs"])
