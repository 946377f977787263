"""Checkpoints of a run; the one file that imports Orbax.

Each checkpoint holds the training state as host arrays, so that it is good for any number
of devices and processes and either strategy, and a JSON object with everything else needed
to go on. In that object is a checksum over all of it: Orbax has none over the values of
arrays, and reads flipped bits as if nothing had happened.
"""

import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxunet.distributed import from_main, is_main, on_main
from jaxunet.earlier import current, forms, stored
from jaxunet.errors import RunError
from jaxunet.steps import TrainState

Which = Literal["latest", "best"]

absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax narrates every file, and its errors


class Checkpoints:
    """The checkpoints under one directory: the latest two, and the best by a metric.

    Saving is asynchronous and atomic: a checkpoint that was not finished is never listed.

    Of several processes, which must all call, number 0 writes and reads; the others get
    what it read, and need not see the directory.
    """

    def __init__(self, directory: Path, best_metric: str, *, read_only: bool = False):
        """Open `directory`; unless `read_only`, make it and remove what a kill left half-made.

        Raises:
            RunError: the scores of every checkpoint are damaged, or it cannot be opened.
        """

        def metric(metrics: dict[str, float]) -> float:
            return metrics.get(best_metric, -math.inf)

        self.directory, self.read_only = directory, read_only
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
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # Orbax would wait for the other processes, which never come here.
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0}, barrier_sync_key_prefix="main"
            )
            if jax.process_count() > 1
            else ocp.options.MultiprocessingOptions(),
        )
        try:
            if not read_only:
                directory.mkdir(parents=True, exist_ok=True)
            self._set_aside_without_scores()
            self._manager = ocp.CheckpointManager(
                directory.absolute(), options=options, item_names=("state", "progress")
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(
                f"The checkpoints in {directory} cannot be listed: {_reason(error)}."
            ) from error

    def _set_aside_without_scores(self) -> None:
        """Orbax reads all scores to begin with, and opens nothing if it can't."""
        found = sorted(self.directory.glob("[0-9]*/metrics/metrics"))
        damaged = {path: reason for path in found if (reason := _json_damage(path))}
        steps = {p.name for p in self.directory.iterdir() if p.name.isdigit()}
        for path, reason in damaged.items():
            step = path.parents[1].name
            said = f"The checkpoint of step {step} in {self.directory} is damaged: {reason}."
            if self.read_only or len(damaged) == len(steps):
                raise RunError(f"{said} Move it away, and the one before it is used.")
            self._set_aside(int(step), said)

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

        Raises:
            RunError: this one, or the one saved before, cannot be written.
        """
        if not is_main():
            return
        step = int(state.step)
        record = {**progress, "checksum": _checksum(state, progress)}
        with self._writing():
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(stored(state)),
                    progress=ocp.args.JsonSave(record),
                ),
                metrics=metrics,
                force=True,
            )

    def wait(self) -> None:
        """Until what was saved is on disk."""
        on_main(self._wait, "saving a checkpoint")

    def _wait(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        # Orbax raises what TensorStore, the file system or its own threads raise.
        except Exception as error:
            raise RunError(
                f"A checkpoint could not be written to {self.directory}: {_reason(error)}. "
                "The earlier ones are whole. Once there is space, go on with --resume."
            ) from error

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

    def restore(self, which: Which, like: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """A checkpoint's step, its state as host arrays in the shape of `like`, its progress.

        When the latest is damaged, the one before is used, and stderr says so; unless
        `read_only`, the damaged one is moved out of the way first.

        Raises:
            RunError: there is none, none can be read, or they are of another architecture.
        """
        state = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        newest = self.step_of(which)

        def read() -> tuple[int, dict[str, Any]]:
            nonlocal state
            step, state, progress = self._read_newest(
                [newest] if which == "best" else self._manager.all_steps(), state
            )
            state = current(state, to_go_on=not self.read_only)
            return step, progress

        step, progress = on_main(read, "reading a checkpoint")
        return step, from_main(state), progress

    def _read_newest(
        self, steps: Sequence[int], target: TrainState
    ) -> tuple[int, TrainState, dict[str, Any]]:
        damaged: dict[int, RunError] = {}
        for step in sorted(steps, reverse=True):
            try:
                state, progress = self._read(step, target)
            except RunError as error:
                damaged[step] = error
                continue
            for bad, found in damaged.items():
                self._set_aside(bad, f"{found} Step {step} is used instead.")
            if damaged:
                self._manager.reload()
            return step, state, progress
        first, *others = damaged.values()
        if others:
            others_too = ", ".join(map(str, list(damaged)[1:]))
            raise RunError(f"{first} Nor can those before it: {others_too}.") from first
        raise first

    def _set_aside(self, step: int, said: str) -> None:
        """Warn, and unless `read_only` move a checkpoint to `damaged-STEP` beside them."""
        if not self.read_only:
            place = self.directory.with_name(f"damaged-{step}")
            if place.exists():
                shutil.rmtree(place)
            (self.directory / str(step)).rename(place)
            said = f"{said} It was moved to {place}."
        print(f"warning: {said}", file=sys.stderr)

    def _read(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        errors: list[Exception] = []
        for form in forms(target):
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(stored(form)),
                        progress=ocp.args.JsonRestore(),
                    ),
                )
                break
            except (ValueError, KeyError, OSError, TypeError) as unread:
                errors.append(unread)
        else:
            # A form that fits and can't be read says more than those that don't fit.
            error = next((e for e in errors if "do not match" not in str(e)), errors[0])
            raise RunError(
                f"The checkpoint of step {step} in {self.directory} cannot be read with this "
                f"configuration: {_reason(error)}."
            ) from error
        state = TrainState(**restored["state"])
        # Orbax gives arrays the shapes that they were saved with, whatever was asked for.
        expected = jax.tree_util.tree_leaves_with_path(form)
        found = jax.tree.leaves(state)
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
        progress = restored["progress"]
        checksum = progress.pop("checksum", None) if isinstance(progress, dict) else None
        if checksum is None or checksum != _checksum(state, progress):
            raise RunError(
                f"The checkpoint of step {step} in {self.directory} is damaged: its contents "
                "are not those of its checksum."
            )
        return state, progress

    def close(self) -> None:
        """Finish saving and let go of the directory."""
        if is_main():
            with self._writing():
                self._manager.close()


def _checksum(state: TrainState, progress: dict[str, Any]) -> int:
    """CRC-32 of the progress and of every array."""
    checksum = zlib.crc32(json.dumps(progress, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        flat = np.ascontiguousarray(leaf).reshape(-1)
        checksum = zlib.crc32(flat.view(np.uint8).data, checksum)
    return checksum


def _json_damage(path: Path) -> str:
    """What is wrong with a file that should hold a JSON object; nothing if it does."""
    try:
        if isinstance(json.loads(path.read_bytes()), dict):
            return ""
        return f"{path.name} holds no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path.name} cannot be read ({error})"


def _reason(error: Exception) -> str:
    """What Orbax says first; after it, it prints whole arrays."""
    for reason in ("No space left on device", "Disk quota exceeded"):
        if reason in str(error):  # behind the names of half a dozen files
            return reason
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith("tree structures do not match:"):
        return f"it is of another model, with a difference in {lines[1].rstrip(':')}"
    return lines[0][:300].rstrip(".")
