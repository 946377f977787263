"""Checkpoints of a run; the one file that imports Orbax.

Each checkpoint holds the training state as host arrays, so that it is good for any number
of devices and processes and either strategy, and a JSON object with everything else needed
to go on.
"""

import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxunet.distributed import from_main, is_main, on_main
from jaxunet.errors import RunError
from jaxunet.steps import TrainState

Which = Literal["latest", "best"]

absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax narrates every file it touches


class Checkpoints:
    """The checkpoints under one directory: the latest two, and the best by a metric.

    Saving is asynchronous and atomic: a checkpoint that was not finished is never listed.

    Of several processes, which must all call, number 0 writes and reads; the others get
    what it read, and need not see the directory.
    """

    def __init__(self, directory: Path, best_metric: str):
        """Open or make `directory`.

        Raises:
            RunError: the scores of a checkpoint are damaged, or it cannot be read.
        """

        def metric(metrics: dict[str, float]) -> float:
            return metrics.get(best_metric, -math.inf)

        self.directory = directory
        if not is_main():
            return
        options = ocp.CheckpointManagerOptions(
            best_fn=metric,
            best_mode="max",
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [
                    preservation_policy.LatestN(2),
                    preservation_policy.BestN(
                        get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            # Orbax would wait for the other processes, which never come here.
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0}, barrier_sync_key_prefix="main"
            )
            if jax.process_count() > 1
            else ocp.options.MultiprocessingOptions(),
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                directory.absolute(), options=options, item_names=("state", "progress")
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(
                f"The checkpoints in {directory} cannot be listed: {_reason(error)}. Move away "
                "the one whose metrics/metrics is damaged."
            ) from error

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, in order."""
        return on_main(
            lambda: sorted(self._manager.all_steps(read=True)), "listing the checkpoints"
        )

    def save(
        self,
        state: TrainState,
        progress: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start saving host arrays `state` and JSON `progress` under the state's step.

        `metrics` are the validation scores of exactly this state, if there are any. A
        checkpoint that already stands at this step is replaced.
        """
        if not is_main():
            return
        step = int(state.step)
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
            metrics=metrics,
            force=True,
        )

    def wait(self) -> None:
        """Until what was saved is on disk."""
        on_main(self._wait, "saving a checkpoint")

    def _wait(self) -> None:
        self._manager.wait_until_finished()

    def step_of(self, which: Which) -> int:
        """Step of the latest checkpoint, or of the one with the best metric.

        Raises:
            RunError: there is no checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise RunError(
                f"{self.directory} holds no finished checkpoint; train first, or give "
                "another run."
            )
        best = None
        if which == "best":
            best = on_main(lambda: self._manager.best_step(), "finding the best checkpoint")
        return steps[-1] if best is None else best

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` as host arrays in the shape of `like`, and its progress.

        Raises:
            RunError: the checkpoint cannot be read, or is of another architecture.
        """
        state = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)

        def read() -> dict[str, Any]:
            nonlocal state
            state, progress = self._read(step, state)
            return progress

        progress = on_main(read, "reading a checkpoint")
        return from_main(state), progress

    def _read(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise RunError(
                f"The checkpoint of step {step} in {self.directory} cannot be read with this "
                f"configuration: {_reason(error)}"
            ) from error
        # Orbax gives arrays the shapes that they were saved with, whatever was asked for.
        expected = jax.tree_util.tree_leaves_with_path(target)
        found = jax.tree.leaves(restored["state"])
        differing = [
            f"{jax.tree_util.keystr(path, simple=True, separator='.')} is "
            f"{x.dtype}{list(x.shape)}, expected {like.dtype}{list(like.shape)}"
            for (path, like), x in zip(expected, found, strict=True)
            if (x.shape, x.dtype) != (like.shape, like.dtype)
        ]
        if differing:
            raise RunError(
                f"The checkpoint of step {step} in {self.directory} is of another model than "
                f"the configuration: {differing[0]}, and {len(differing) - 1} more. Go back "
                "to the configuration that it was made with."
            )
        return restored["state"], restored["progress"]

    def close(self) -> None:
        """Finish saving and let go of the directory."""
        if is_main():
            self._manager.close()


def _reason(error: Exception) -> str:
    """What Orbax says first; after it, it prints whole arrays."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith("tree structures do not match:"):
        return f"it is of another model, with a difference in {lines[1].rstrip(':')}"
    return lines[0][:300]
