"""What averaging, thresholds, clean-up and temperature gain on a split, each by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from jaxunet.devices.strategies import Strategy
from jaxunet.inference.comparison import Scores, compare, compared, paired
from jaxunet.learning import calibration
from jaxunet.learning.bootstrap import calibration_intervals
from jaxunet.learning.clean_up import cleaned
from jaxunet.learning.metrics import Counts
from jaxunet.learning.views import Views
from jaxunet.runs.calibration import calibrate
from jaxunet.runs.checkpoint import Which
from jaxunet.runs.loading import TrainedModel, load
from jaxunet.runs.own_data import own_split
from jaxunet.runs.scoring import Maps, evaluate_split, mask_counts

AS_IS = "as is"


@dataclass
class Way:
    """One way to make masks of a model's maps, and what it makes of those it has seen.

    Attributes:
        together: of all runs, not of one alone.
        member: else of which run, the first being 0.
        fitted: what of it was fitted on the validation split.
    """

    name: str
    threshold: float
    views: Views = "none"
    together: bool = False
    temperature: float = 1.0
    clean: bool = False
    fitted: tuple[str, ...] = ()
    member: int = 0
    _counts: list[Counts] = field(default_factory=list)
    _bins: list[calibration.Bins] = field(default_factory=list)
    _entropy: list[np.ndarray] = field(default_factory=list)

    def look(self, maps: Maps) -> None:
        """Take in a batch of maps, made without a temperature."""
        truth, probabilities = maps["truth"], maps["probabilities"]
        counted = maps.get("counted", ...)
        if self.temperature != 1:
            probabilities = expit(maps["logits"] / np.float32(self.temperature))
        masks = probabilities > self.threshold
        masks = cleaned(masks) if self.clean else masks
        self._counts.append(mask_counts(masks, maps))
        self._bins.append(calibration.reliability(probabilities, truth, counted))
        self._entropy.append(
            calibration.cross_entropy(maps["logits"], truth, self.temperature, counted)
        )

    def against(self, other: "Way") -> dict[str, Any]:
        """All that it scores, and how that differs from `other`, image by image."""
        found: dict[str, Any] = compare(self.counts, other.counts)
        bins = {AS_IS: np.concatenate(other._bins), "with": np.concatenate(self._bins)}
        error = {n: float(calibration.calibration_error(b.sum(0))) for n, b in bins.items()}
        found |= paired({"cross_entropy": self.entropy}, {"cross_entropy": other.entropy})
        found["calibration_error"] = {
            "first": error["with"],
            "second": error[AS_IS],
            "difference": error["with"] - error[AS_IS],
            "interval": calibration_intervals(bins)[f"with less {AS_IS}"],
        }
        return found

    @property
    def counts(self) -> Counts:
        return np.concatenate(self._counts)

    @property
    def entropy(self) -> np.ndarray:
        """Cross-entropy of each image."""
        return np.concatenate(self._entropy)

    def described(self) -> dict[str, Any]:
        """For the record."""
        names = ("name", "threshold", "views", "together", "temperature", "clean")
        return {**{n: getattr(self, n) for n in names}, "fitted_on_validation": self.fitted}


def averaging(ensemble: Way, alone: Sequence[Way]) -> dict[str, dict[str, Any]]:
    """What the runs score together, less the mean of what each scores alone, image by image.

    Against their mean, and not the best of them: which is the best, these images themselves
    would say.

    Returns:
        For each score what `paired` gives: `first` together, `second` alone.
    """

    def scores(way: Way) -> Scores:
        return {**compared(way.counts), "cross_entropy": way.entropy}

    one, others = scores(ensemble), [scores(way) for way in alone]
    return paired(one, {name: np.mean([x[name] for x in others], axis=0) for name in one})


def gains(
    runs: Sequence[Path],
    which: Which,
    split: str,
    strategy: Strategy,
    *,
    show_progress: bool = True,
) -> dict[str, Any]:
    """How the first of `runs` scores on a split of its own data as it is, and what changes
    with each of: two sets of views, the other runs, the fitted threshold, clean-up, the fitted
    temperature, and all of them.

    Threshold and temperature are those of `jaxunet.runs.calibration`, fitted on the
    validation split: there, their gains flatter.

    Returns:
        `dataset`; `ways`, each with `scores`: for each score `first` (with it), `second` (as
        is), their mean `difference` and its 95% bootstrap `interval` over images; of several
        runs also `averaging`, with such `scores` against the mean of the runs, each alone.

    Raises:
        DataError: the data have changed.
        RunError: a run's weights make logits that are not finite.
    """
    everyone, several = load(runs, which), len(runs) > 1
    singles = [load([run], which) for run in runs] if several else [everyone]
    first = singles[0]
    own = first.recipe.threshold
    data, dataset = own_split(
        everyone, split, advice="Gains are of the run's own data.", show_progress=show_progress
    )

    def seen(together: bool, views: Views, member: int = 0) -> TrainedModel:
        model = everyone if together else singles[member]
        return replace(model, recipe=replace(model.recipe, views=views))

    alone = calibrate(seen(False, "none"), strategy, show_progress=show_progress)
    best = calibrate(seen(several, "d4"), strategy, show_progress=show_progress)
    moved = calibration.tempered(best.threshold, best.temperature)
    fitted = ("threshold", "temperature")
    ways = [
        Way(AS_IS, own),
        Way("views flips", own, "flips"),
        Way("views d4", own, "d4"),
        *([Way(f"ensemble of {len(runs)}", own, together=True)] if several else []),
        Way("threshold auto", alone.threshold, fitted=("threshold",)),
        Way("clean", own, clean=True),
        Way(
            "temperature auto",
            own,
            temperature=alone.temperature,
            fitted=("temperature",),
        ),
        Way("all of them", moved, "d4", several, best.temperature, True, fitted),
    ]
    others = [
        Way(str(run), single.recipe.threshold, member=member)
        for member, (run, single) in enumerate(zip(runs, singles, strict=True))
        if member
    ]

    def sees(way: Way) -> tuple[bool, Views, int]:
        return way.together, way.views, way.member

    for sight in dict.fromkeys(map(sees, [*ways, *others])):
        looking = [way for way in [*ways, *others] if sees(way) == sight]

        def look(maps: Maps, looking: list[Way] = looking) -> None:
            for way in looking:
                way.look(maps)

        model = seen(*sight)
        evaluation = evaluate_split(
            model,
            strategy,
            data,
            split,
            model.config.data,
            look=look,
            show_progress=show_progress,
        )
        evaluation.require_finite(model.step, f"{dataset['name']} {split}")
    averaged = {}
    if several:
        (ensemble,) = (way for way in ways if way.together and way.views == "none")
        averaged["averaging"] = {
            "name": f"{ensemble.name} less the mean of its runs",
            "scores": averaging(ensemble, [ways[0], *others]),
        }
    return {
        "dataset": dataset,
        "runs": [member.described() for member in everyone.members],
        "validation_split": first.config.data.validation_split,
        "ways": [{**way.described(), "scores": way.against(ways[0])} for way in ways],
        **averaged,
    }
