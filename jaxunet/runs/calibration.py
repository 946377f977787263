"""The threshold and the temperature that serve a model best on its validation split.

Both are fitted in one pass when they are first asked for, and kept in the run; those of an
ensemble in its first run. What they were fitted for is kept with them: where weights or views
are others, they are fitted anew.

The temperature divides the logit of the probability that all views and runs have together.
The threshold is the one for probabilities without a temperature, and moves with it
(`jaxunet.learning.calibration.tempered`), so that masks stay as they are.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxunet.config import DataConfig, require
from jaxunet.devices.distributed import on_main
from jaxunet.devices.environment import environment
from jaxunet.devices.strategies import Strategy
from jaxunet.errors import ConfigError, RunError
from jaxunet.files import check_writable, write_json
from jaxunet.learning import calibration
from jaxunet.provenance import disagreement
from jaxunet.runs.loading import TrainedModel
from jaxunet.runs.own_data import own_split
from jaxunet.runs.scoring import Maps, evaluate_split

FILE = "calibration.json"
Auto = Literal["auto"]


@dataclass(frozen=True)
class Calibration:
    """What serves best on the validation split."""

    threshold: float
    temperature: float


def settle(
    model: TrainedModel,
    strategy: Strategy,
    *,
    threshold: float | Auto | None = None,
    temperature: float | Auto = 1.0,
    data: DataConfig | None = None,
    show_progress: bool = True,
) -> TrainedModel:
    """`model` with a threshold and a temperature; what is `auto` comes from `calibrate`.

    Args:
        threshold: of the probabilities as they come out; None: the runs' own.
        data: see `calibrate`.

    Raises:
        ConfigError: a number is out of its range, or the runs' own thresholds differ.
    """
    if threshold != "auto" and threshold is not None:
        require(0 < threshold < 1, "threshold", threshold, "'auto', or between 0 and 1")
    if temperature != "auto":
        require(0 < temperature < np.inf, "temperature", temperature, "'auto', or above 0")
    if threshold is None:
        own = {str(each.run): each.config.train.threshold for each in model.members}
        if len(set(own.values())) > 1:
            said = ", ".join(f"{value} of {run}" for run, value in own.items())
            raise ConfigError(f"The runs' thresholds differ ({said}): give one, or 'auto'.")
        threshold = model.recipe.threshold
    if "auto" in (threshold, temperature):
        found = calibrate(model, strategy, data=data, show_progress=show_progress)
        temperature = found.temperature if temperature == "auto" else temperature
        if threshold == "auto":
            threshold = calibration.tempered(found.threshold, temperature)
    if np.float32(threshold) in (0, 1):
        raise ConfigError(
            f"At a temperature of {temperature:g} the threshold is {threshold!r}, which "
            "float32 can't tell from certainty: give a higher temperature, or 1."
        )
    recipe = replace(model.recipe, threshold=float(threshold), temperature=float(temperature))
    return replace(model, recipe=recipe)


def calibrate(
    model: TrainedModel,
    strategy: Strategy,
    *,
    data: DataConfig | None = None,
    show_progress: bool = True,
) -> Calibration:
    """The threshold and temperature for `model` as it sees pictures: kept, or fitted and kept.

    Args:
        data: where the runs' data may be now; other data than theirs are never fitted on.

    Raises:
        ConfigError: the runs were validated on different splits.
        DataError: nothing is kept for these weights and views, and the runs' data have
            changed or can't be read.
        RunError: they can't be kept, or what they are kept in is damaged.
    """
    path = model.members[0].run / FILE
    wanted = _fitted_for(model)

    def find() -> dict[str, Any] | None:
        for fit in _read(path).values():
            if fit["fitted_for"] == wanted:
                return {name: fit[name] for name in ("threshold", "temperature")}
        return None

    kept = on_main(find, f"reading {FILE}")
    if kept is None:
        kept = _fit(model, strategy, path, data, show_progress)
    return Calibration(kept["threshold"], kept["temperature"])


def _fitted_for(model: TrainedModel) -> dict[str, Any]:
    members = [{"step": each.step, "weights": each.weights} for each in model.members]
    return {"members": members, "views": model.recipe.views}


def _read(path: Path) -> dict[str, Any]:
    """All that is kept in `path`: a fit for each way to use the run."""
    if not path.exists():
        return {}
    try:
        fits = dict(json.loads(path.read_bytes()))
        for fit in fits.values():
            numbers = fit["threshold"], fit["temperature"]
            if not (0 < numbers[0] < 1 and 0 < numbers[1] < np.inf and fit["fitted_for"]):
                raise ValueError(f"It says {numbers}")
        return fits
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read: {str(error).rstrip('.')}. Move it away, and threshold and "
            "temperature are fitted anew."
        ) from error


def _slot(model: TrainedModel) -> str:
    """What a fit is called in the file: one of the same name is replaced."""
    first, *others = model.members
    views = "" if model.recipe.views == "none" else model.recipe.views
    return "-".join(filter(None, [first.which, views, *(f"with {m.run.name}" for m in others)]))


def _fit(
    model: TrainedModel,
    strategy: Strategy,
    path: Path,
    given: DataConfig | None,
    show_progress: bool,
) -> dict[str, float]:
    first, *others = model.members
    for other in others:
        changed = disagreement(
            _splits(first), _splits(other), recorded=str(first.run), there=str(other.run)
        )
        if changed:
            raise ConfigError(
                f"{changed} What one was validated on, another may have been trained on, so "
                "that nothing can be fitted there: give numbers instead of 'auto'."
            )
    on_main(lambda: check_writable(path.parent, "RUN"), f"writing {FILE}")
    data_config = model.config.data
    split = data_config.validation_split
    data, dataset = own_split(
        model,
        split,
        advice="What is 'auto' is fitted on the run's own validation split: bring the data "
        "back, or give numbers.",
        given=given,
        show_progress=show_progress,
    )
    plain = replace(model, recipe=replace(model.recipe, temperature=1.0))
    tables: list[np.ndarray] = []
    logits = np.zeros((2, 2, 0))

    def look(maps: Maps) -> None:
        nonlocal logits
        truth, counted = maps["truth"], maps.get("counted", ...)
        tables.append(calibration.count_thresholds(maps["probabilities"], truth, counted))
        found = calibration.count_logits(maps["logits"], truth, counted)
        logits = logits + found if logits.size else found

    evaluation = evaluate_split(
        plain, strategy, data, split, data_config, look=look, show_progress=show_progress
    )
    evaluation.require_finite(model.step, f"{dataset['name']} {split}")
    if not np.isfinite(logits).all():
        raise RunError(
            f"Logits of {first.run} on {dataset['name']} {split} are not finite, and no "
            "temperature fits them. Take another checkpoint, or leave --temperature out."
        )
    threshold, dice = calibration.best_threshold(np.concatenate(tables))
    fit = {
        "threshold": threshold,
        "temperature": calibration.fit_temperature(logits),
        "fitted_for": _fitted_for(model),
        "runs": [each.described() for each in model.members],
        "fitted_on": dataset,
        "dice_by_threshold": dict(
            zip(map(str, calibration.THRESHOLDS), dice.tolist(), strict=True)
        ),
        **environment(),
    }
    slot = _slot(model)
    on_main(lambda: write_json(path, {**_read(path), slot: fit}), f"writing {FILE}")
    return {name: fit[name] for name in ("threshold", "temperature")}


def _splits(member: Any) -> dict[str, Any]:
    data = member.config.data
    return {"train_split": data.train_split, "validation_split": data.validation_split}
