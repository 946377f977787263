"""Checkpoints of a run: saved, found, read back whole or not at all.

Each checkpoint holds the training state as host arrays, so that it is good for any number
of devices and processes and either strategy, and a JSON object with everything else needed
to go on. In that object is a checksum over all of it: Orbax has none over the values of
arrays, and reads flipped bits as if nothing had happened.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from jaxunet.devices.distributed import from_main, is_main, on_main
from jaxunet.errors import RunError
from jaxunet.files import check_encodable, check_writable, system_error, why, write_atomically
from jaxunet.learning.steps import TrainState
from jaxunet.provenance import disagreement
from jaxunet.runs import orbax
from jaxunet.runs.earlier import current
from jaxunet.runs.integrity import checksum_of, json_damage, other_arrays

T = TypeVar("T")
Which = Literal["latest", "best"]
SCORES, PROGRESS = Path("metrics", "metrics"), Path("progress", "metadata")  # in each of them
LOOKS = 20  # at the checkpoints of a run that removes old ones meanwhile
REMOVAL = 0.2  # seconds that it may take to remove one


class Checkpoints:
    """The checkpoints under one directory: the latest two, and the best by a metric.

    Saving is asynchronous and atomic: a checkpoint that was not finished is never listed,
    and nothing is removed before what replaces it is whole.

    Of several processes, which must all call, number 0 writes and reads; the others get
    what it read, and need not see the directory.
    """

    def __init__(self, directory: Path, best_metric: str, *, read_only: bool = False):
        """Open `directory`; unless `read_only`, make it and remove what a kill left half-made.

        Raises:
            RunError: the scores of every checkpoint are damaged, or it cannot be opened, or
                not be written to.
        """

        self.directory, self.read_only = directory, read_only
        if not is_main():
            return
        if read_only:
            check_encodable(directory)
        else:
            check_writable(directory)

        def opened() -> orbax.Manager:
            self._set_aside_without_scores()
            return orbax.open_manager(directory, best_metric, read_only=read_only)

        try:
            self._manager = self._look(opened)
        except orbax.NOT_READ as error:
            raise RunError(
                f"The checkpoints in {directory} cannot be listed: {orbax.reason(error)}."
            ) from error

    def _look(self, function: Callable[[], T]) -> T:
        """`function`, again while what it reads is removed under it, by a run in training."""
        for _ in range(LOOKS if self.read_only else 0):
            try:
                return function()
            except FileNotFoundError:
                if not self.directory.exists():
                    raise
        return function()

    def _set_aside_without_scores(self) -> None:
        """Orbax reads all scores to begin with, and opens nothing if it can't."""
        steps = [path for path in self.directory.iterdir() if path.name.isdigit()]
        found = {path: json_damage(path / SCORES) for path in sorted(steps)}
        damaged = {path: reason for path, reason in found.items() if reason}
        for path, reason in damaged.items():
            said = (
                f"The checkpoint of step {path.name} in {self.directory} is damaged: {reason}."
            )
            if self.read_only or len(damaged) == len(steps):
                raise RunError(f"{said} Move it away, and the one before it is used.")
            self._set_aside(int(path.name), said)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, in order."""

        def listed() -> list[int]:
            self._manager.reload()
            return sorted(self._manager.all_steps())

        return on_main(lambda: self._look(listed), "listing the checkpoints")

    def save(
        self,
        state: TrainState,
        progress: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start saving host arrays `state` and JSON `progress` under the state's step.

        `metrics` are the validation scores of exactly this state, if there are any. Where a
        checkpoint of this step stands already, as after a stop before its evaluation, it
        has the same state, and gets the progress and the scores.

        Raises:
            RunError: this one, or the one saved before, cannot be written.
        """
        if not is_main():
            return
        step = int(state.step)
        record = {**progress, "checksum": checksum_of(state, progress)}
        with self._writing():
            if step in self._manager.all_steps():
                self._complete(step, state, record, metrics)
                return
            orbax.save(self._manager, state, record, metrics)

    def _complete(
        self,
        step: int,
        state: TrainState,
        record: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        """Give the checkpoint that stands at `step` other progress, and scores.

        After a kill at any moment it is whole, with the old progress or the new: each file
        is replaced at once, and scores that the old progress doesn't know of do no harm.
        """
        self._manager.wait_until_finished()
        folder = self.directory / str(step)
        before = json.loads((folder / PROGRESS).read_bytes())
        if before.pop("checksum") != checksum_of(state, before):
            raise RunError(
                f"The checkpoint of step {step} in {self.directory} is of another state than "
                "the run has at that step; move it away."
            )
        if metrics is not None:
            write_atomically(folder / SCORES, json.dumps(metrics))
        write_atomically(folder / PROGRESS, json.dumps(record))
        self._manager.reload()
        steps = sorted(self._manager.all_steps())
        for old in set(steps[: -orbax.KEPT]) - {self._manager.best_step()}:
            self._manager.delete(old)

    def forget_scores(self) -> None:
        """They are of other data: none of these checkpoints is the best on the new ones."""
        for step in self.steps():
            scores = self.directory / str(step) / SCORES
            if is_main() and scores.exists():
                write_atomically(scores, "{}")
        self.steps()  # read anew

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
        # Orbax raises what TensorStore, the file system or its own threads raise. What is not
        # the system's error is a mistake of ours, and keeps its traceback.
        except Exception as error:
            system = system_error(error)
            if system is None:
                raise
            raise RunError(
                f"A checkpoint could not be written to {self.directory}: "
                f"{why(system, self.directory)} The earlier ones are whole. Once that is "
                "mended, go on with --resume."
            ) from error

    def step_of(self, which: Which) -> int:
        """Step of the latest checkpoint, or of the one with the best metric.

        Raises:
            RunError: there is no checkpoint.
        """

        def find() -> int:
            self._manager.reload()
            return self._step_of(which)

        return on_main(lambda: self._look(find), f"finding the {which} checkpoint")

    def _step_of(self, which: Which) -> int:
        steps = self._manager.all_steps()
        if not steps:
            raise RunError(
                f"{self.directory} holds no finished checkpoint; train first, or give "
                "another run."
            )
        best = self._manager.best_step() if which == "best" else None
        return max(steps) if best is None else best

    def restore(self, which: Which, like: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """A checkpoint's step, its state as host arrays in the shape of `like`, its progress.

        When the latest is damaged, the one before is used, and stderr says so; unless
        `read_only`, the damaged one is moved out of the way first.

        Raises:
            RunError: there is none, none can be read, or they are of another architecture.
        """
        state = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)

        def read() -> tuple[int, dict[str, Any]]:
            nonlocal state
            step, state, progress = self._look(partial(self._read_which, which, state))
            state = current(state, to_go_on=not self.read_only)
            return step, progress

        step, progress = on_main(read, "reading a checkpoint")
        return step, from_main(state), progress

    def _read_which(
        self, which: Which, target: TrainState
    ) -> tuple[int, TrainState, dict[str, Any]]:
        self._manager.reload()
        step = self._step_of(which)
        steps = [step] if which == "best" else self._manager.all_steps()
        return self._read_newest(steps, target)

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
        try:
            state, form, progress = orbax.read(self._manager, step, target)
        except orbax.NOT_READ as error:
            if self.read_only:
                time.sleep(REMOVAL)
                if not (self.directory / str(step)).exists():
                    raise FileNotFoundError(f"step {step} was removed") from error
            raise RunError(
                f"The checkpoint of step {step} in {self.directory} cannot be read with this "
                f"configuration: {orbax.reason(error)}."
            ) from error
        # Orbax gives arrays the shapes that they were saved with, whatever was asked for.
        differing = other_arrays(state, form)
        if differing:
            raise RunError(
                f"The checkpoint of step {step} in {self.directory} is of another model than "
                f"the configuration: {differing[0]}, and {len(differing) - 1} more. Go back "
                "to the configuration that it was made with."
            )
        checksum = progress.pop("checksum", None) if isinstance(progress, dict) else None
        if checksum is None or disagreement(
            {"checksum": checksum},
            {"checksum": checksum_of(state, progress)},
            recorded="the record",
            there="the contents",
        ):
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
