"""What Orbax is asked of a run's checkpoints; the one file that imports it."""

import math
from pathlib import Path
from typing import Any, TypeAlias

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxunet.learning.steps import TrainState
from jaxunet.runs.earlier import forms, stored

Manager: TypeAlias = ocp.CheckpointManager
KEPT = 2  # of the latest checkpoints
NOT_READ = (ValueError, KeyError, TypeError, OSError)  # what Orbax raises of what is there

absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax narrates every file, and its errors


def open_manager(directory: Path, best_metric: str, *, read_only: bool) -> Manager:
    """The manager of `directory`, which keeps the latest checkpoints and the best by a metric.

    It reads all scores to begin with.
    """

    def metric(metrics: dict[str, float]) -> float:
        return metrics.get(best_metric, -math.inf)

    options = ocp.CheckpointManagerOptions(
        best_fn=metric,
        best_mode="max",
        preservation_policy=preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(KEPT),
                preservation_policy.BestN(
                    get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        ),
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        # Made in a thread, a folder that can't be made is waited for for 300 s.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        # Orbax would wait for the other processes, which never come here.
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            active_processes={0}, barrier_sync_key_prefix="main"
        )
        if jax.process_count() > 1
        else ocp.options.MultiprocessingOptions(),
    )
    return Manager(directory.absolute(), options=options)


def save(
    manager: Manager,
    state: TrainState,
    record: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Start saving host arrays and the record of them under the state's step."""
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(stored(state)),
            progress=ocp.args.JsonSave(record),
        ),
        metrics=metrics,
        force=True,
    )


def read(manager: Manager, step: int, like: TrainState) -> tuple[TrainState, TrainState, Any]:
    """The state of a step, the form of `like` that it was read by, and its record.

    Raises:
        one of `NOT_READ`: it can't be read by any form.
    """
    errors: list[Exception] = []
    for form in forms(like):
        try:
            found = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(stored(form)),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        except NOT_READ as error:
            errors.append(error)
        else:
            return TrainState(**found["state"]), form, found["progress"]
    # A form that fits and can't be read says more than those that don't fit.
    raise next((e for e in errors if "do not match" not in str(e)), errors[0])


def reason(error: Exception) -> str:
    """What Orbax says first; after it, it prints whole arrays."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith("tree structures do not match:"):
        return f"it is of another model, with a difference in {lines[1].rstrip(':')}"
    return lines[0][:300].rstrip(".")
