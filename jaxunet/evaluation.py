"""Score a model on a whole split: every image exactly once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxunet.config import Config
from jaxunet.data.order import Order
from jaxunet.data.pipeline import Source, make_batches
from jaxunet.metrics import scores
from jaxunet.parallel import Step, Strategy


@dataclass(frozen=True)
class Evaluation:
    """Results on one split, in the dataset's order.

    Attributes:
        counts: int64 [images, 4]: true and false positives, false and true negatives.
        loss: mean loss over images.
        seconds: wall time.
    """

    counts: np.ndarray
    loss: float
    seconds: float

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Every metric under every protocol; see `jaxunet.metrics.scores`."""
        return scores(self.counts)


def evaluate(
    strategy: Strategy,
    compiled_eval: Step,
    variables: Any,
    source: Source,
    config: Config,
    *,
    progress: bool = True,
    check_stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the compiled eval step over all of `source`.

    Args:
        compiled_eval: `strategy.compile` of `jaxunet.steps.eval_step`.
        variables: placed by `strategy`.
        check_stop: called between batches; may raise to stop.
    """
    start = time.perf_counter()
    order = Order(
        len(source),
        config.train.eval_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    total = order.batches_per_epoch
    batches = make_batches(source, config.data, order, total)
    results = []
    for batch in tqdm(batches, "evaluate", total, disable=not progress, leave=False):
        check_stop()
        results.append(compiled_eval(variables, strategy.split(batch)))
    host = [strategy.fetch(result) for result in results]
    counts = np.concatenate([r["counts"] for r in host])[: len(source)].astype(np.int64)
    loss = np.concatenate([r["loss"] for r in host])[: len(source)].astype(np.float64)
    return Evaluation(counts, float(loss.mean()), time.perf_counter() - start)


def report(
    evaluation: Evaluation,
    *,
    dataset: dict[str, Any],
    step: int,
    epoch: int,
    wall_seconds: float | None = None,
    images_per_second: float | None = None,
) -> dict[str, Any]:
    """The object that summary.json and evaluation-<split>.json hold."""
    count = len(evaluation.counts)
    return {
        "dataset": dataset,
        "scores": evaluation.scores,
        "loss": evaluation.loss,
        "step": step,
        "epoch": epoch,
        "wall_seconds": evaluation.seconds if wall_seconds is None else wall_seconds,
        "images_per_second": count / evaluation.seconds
        if images_per_second is None
        else images_per_second,
    }
