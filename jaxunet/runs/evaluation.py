"""Score a model on a whole split: every image exactly once."""

import csv
import io
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxunet.bars import Bar
from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.data import Prepared
from jaxunet.data.sampler import BatchSampler
from jaxunet.devices import tuning
from jaxunet.devices.distributed import same_everywhere
from jaxunet.devices.environment import environment
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import Step
from jaxunet.errors import RunError
from jaxunet.learning import boundary
from jaxunet.learning.bootstrap import calibration_intervals, intervals, mean_intervals
from jaxunet.learning.calibration import described
from jaxunet.learning.metrics import per_image, scores

DECIDING_PACKAGES = ("jaxunet", "jax", "jaxlib", "flax", "optax", "numpy")
IN_FLIGHT = 2  # batches: the devices have work meanwhile, and few maps take memory
LOCAL = ("data.dir", "data.prepared_dir", "data.loader", "data.workers")
"""Options that each host may have its own of: the examples are the same."""

COUNTED = ("true_positives", "false_positives", "false_negatives", "true_negatives")
"""What the columns of `Evaluation.counts` are, in pixels."""


@dataclass(frozen=True)
class Evaluation:
    """Results on one split, in the dataset's order.

    Attributes:
        counts: int64 [images, 4]: true and false positives, false and true negatives.
        loss: mean loss over images; None where it was not computed.
        seconds: wall time.
        boundary: float64 [images, 2]: see `jaxunet.learning.boundary`; None where masks were
            not compared at their own size.
        bins: how probabilities agree with the truth, image by image
            (`jaxunet.learning.calibration.reliability`); None where that was not computed.
    """

    counts: np.ndarray
    loss: float | None
    seconds: float
    boundary: np.ndarray | None = None
    bins: np.ndarray | None = None

    @property
    def per_image(self) -> dict[str, np.ndarray]:
        """Every score of each image, of its pixels and of its boundary."""
        return {**per_image(self.counts), **self._of_boundary}

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Every metric under every protocol; see `jaxunet.learning.metrics.scores`."""
        found = scores(self.counts)
        found["per_image"].update({k: float(v.mean()) for k, v in self._of_boundary.items()})
        return found

    @property
    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """The interval of each of `scores`; see `jaxunet.learning.bootstrap`."""
        found = intervals(self.counts)
        if self._of_boundary:
            found["per_image"].update(mean_intervals(self._of_boundary))
        return found

    @property
    def _of_boundary(self) -> dict[str, np.ndarray]:
        columns = () if self.boundary is None else self.boundary.T
        return dict(zip(boundary.NAMES, columns, strict=False))

    def require_finite(self, step: int, where: str) -> None:
        """Raise `RunError` if the loss is not finite: scores would mean nothing."""
        if self.loss is not None and not math.isfinite(self.loss):
            raise RunError(
                f"The loss of step {step} on {where} is {self.loss}: the run's weights, or "
                "what they make of an image, are not finite, and scores would mean nothing. "
                "Use an earlier checkpoint, or train anew with a lower "
                "optimizer.learning_rate."
            )


def evaluate(
    feed: Feed,
    compiled_eval: Step,
    variables: Any,
    config: Config,
    *,
    progress: bool = True,
    check_stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the compiled eval step over all of a split.

    Args:
        compiled_eval: `feed.compile` of `jaxunet.learning.steps.eval_step`.
        variables: placed by the feed's strategy.
        check_stop: called between batches; may raise to stop.
    """
    start = time.perf_counter()
    given = results(
        feed, compiled_eval, variables, config, progress=progress, check_stop=check_stop
    )
    found = list(given)
    counts = np.concatenate([each["counts"] for each in found]).astype(np.int64)
    return Evaluation(counts, mean_loss(found), time.perf_counter() - start)


def results(
    feed: Feed,
    compiled: Step,
    variables: Any,
    config: Config,
    *,
    progress: bool = True,
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, np.ndarray]]:
    """What a compiled step gives for each batch of a split: arrays of its images, on the host.

    The devices are `IN_FLIGHT` batches ahead. The arguments are those of `evaluate`.
    """
    order = BatchSampler(
        len(feed),
        tuning.eval_batch_size(config.train),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    total, left = order.batches_per_epoch, len(feed)
    waiting: deque[Any] = deque()

    def fetched() -> dict[str, np.ndarray]:
        nonlocal left
        host = feed.strategy.fetch(waiting.popleft())
        host = {name: each[:left] for name, each in host.items()}
        left -= len(host["loss"])
        return host

    with closing(feed.batches(order, total)) as batches:
        for batch in Bar("evaluate", total, batches, show=progress):
            check_stop()
            waiting.append(compiled(variables, feed.place(batch)))
            if len(waiting) > IN_FLIGHT:
                yield fetched()
        while waiting:
            yield fetched()


def mean_loss(found: Sequence[Mapping[str, np.ndarray]]) -> float:
    """The mean over all images of `results`."""
    return float(np.concatenate([each["loss"] for each in found]).astype(np.float64).mean())


def report(
    evaluation: Evaluation,
    *,
    dataset: dict[str, Any],
    step: int,
    epoch: int,
    wall_seconds: float | None = None,
    images_per_second: float | None = None,
) -> dict[str, Any]:
    """The object that summary.json and evaluation-<split>.json hold.

    Raises:
        RunError: the loss is not finite.
    """
    count = len(evaluation.counts)
    loss = {} if evaluation.loss is None else {"loss": evaluation.loss}
    evaluation.require_finite(step, f"{dataset['name']} {dataset['split']}")
    return {
        "dataset": dataset,
        "scores": evaluation.scores,
        "intervals": evaluation.intervals,
        **loss,
        **_calibration(evaluation),
        "step": step,
        "epoch": epoch,
        "wall_seconds": evaluation.seconds if wall_seconds is None else wall_seconds,
        "images_per_second": count / evaluation.seconds
        if images_per_second is None
        else images_per_second,
    }


def _calibration(evaluation: Evaluation) -> dict[str, Any]:
    if evaluation.bins is None:
        return {}
    interval = calibration_intervals({"": evaluation.bins})[""]
    return {"calibration": {**described(evaluation.bins), "interval": interval}}


def table(ids: Sequence[str], evaluation: Evaluation) -> str:
    """A CSV file's text: the scores and the counts of each image, a line each."""
    values = evaluation.per_image
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["id", *values, *COUNTED])
    for place, (name, counts) in enumerate(zip(ids, evaluation.counts, strict=True)):
        lines.writerow([name, *(f"{v[place]:.6f}" for v in values.values()), *counts])
    return text.getvalue()


def describe(
    *,
    name: str,
    split: str,
    count: int,
    image_size: int | str,
    fingerprint: str,
    counts: dict[str, int],
    official_counts: Mapping[str, int | None],
) -> dict[str, Any]:
    """What was scored or trained on, for the record, with all that is not official in it.

    Args:
        counts, official_counts: of every split of the dataset.
    """
    return {
        "name": name,
        "split": split,
        "count": count,
        "official_count": official_counts.get(split.partition("[")[0]),
        "image_size": image_size,
        "fingerprint": fingerprint,
        "counts": counts,
        "unofficial_splits": {
            each: f"{found} of {official_counts[each]}"
            for each, found in counts.items()
            if official_counts.get(each) not in (None, found)
        },
    }


def describe_split(data: Prepared, split: str, image_size: int) -> dict[str, Any]:
    """`describe` for a split, or a slice of one, of a prepared dataset."""
    described = describe(
        name=data.name,
        split=split,
        count=data.count(split),
        image_size=image_size,
        fingerprint=data.fingerprint,
        counts=data.counts,
        official_counts=data.official_counts,
    )
    return {**described, "stored_size": data.stored_size}


def check_hosts(config: Config, data: Prepared) -> None:
    """Make sure that all processes work on the same data, with the same configuration and code.

    Raises:
        RunError: one differs from process 0; on every process, naming it.
    """
    here = environment()
    same_everywhere(
        {
            "data": {
                "fingerprint": data.fingerprint,
                "counts": data.counts,
                "stored_size": data.stored_size,
            },
            "config": to_dict(config),
            "git_commit": here["git_commit"],
            "tuning": here["tuning"],
            "versions": {name: here["versions"][name] for name in DECIDING_PACKAGES},
        },
        ignore={*(f"config.{name}" for name in LOCAL), "tuning.xla_flags"},
    )
