"""A trace of some of a run's steps, for the profile plugin of TensorBoard (XProf)."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxunet.bars import note, say
from jaxunet.devices.distributed import is_main
from jaxunet.errors import ConfigError

Steps = tuple[int, int]
"""How many steps are done when a trace begins, and when it ends."""


def steps_of(text: str) -> Steps:
    """`A:B`, as `--profile-steps` takes it.

    Raises:
        ConfigError: it is something else, or there is no step in it.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not found:
        raise _no_steps(text)
    return check((int(found[1]), int(found[2])))


def check(steps: Steps) -> Steps:
    """`steps`, if there is one among them; else raises `ConfigError`."""
    if not 0 <= steps[0] < steps[1]:
        raise _no_steps(f"{steps[0]}:{steps[1]}")
    return steps


def _no_steps(text: str) -> ConfigError:
    return ConfigError(
        f"--profile-steps is {text!r}, but must be A:B with A < B: 10:13 traces three steps, "
        "from when 10 are done until 13 are."
    )


class Trace:
    """The trace of steps `first + 1` to `last`; without `steps`, and but on process 0, none.

    It is in `RUN/tensorboard/plugins/profile`, where the plugin looks for it. At both ends all
    that was dispatched is waited for, so that it has these steps and no others.
    """

    def __init__(self, steps: Steps | None, run: Path, done: int, total: int, show: bool):
        """Args: done, total: steps of the run, now and at its end. show: say where it is.

        Raises:
            ConfigError: there are none, or the run ends before.
        """
        if steps is not None:
            first, last = check(steps)
            said = f"--profile-steps is {first}:{last}, but the run"
            if last > total:
                raise ConfigError(f"{said} is over after {total} steps.")
            if first < done:
                # No error: a queue starts the same command again when the steps are done.
                if show:
                    note(f"note: there is no trace: {said} has done {done} steps already.")
                steps = None
        self._steps = steps if is_main() else None
        self._folder, self._show = run / "tensorboard", show
        self._running, self._done = False, done

    @contextmanager
    def step(self, done: int, state: Callable[[], Any]) -> Iterator[None]:
        """Around the step after `done` ones; `state` gives what the last one made."""
        first, last = self._steps or (0, 0)
        if not first <= done < last:
            yield
            return
        if done == first:
            jax.block_until_ready(state())
            self._start()
        # By this name and number XProf tells the steps apart.
        with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
            yield
        self._done = done + 1
        if done + 1 == last:
            jax.block_until_ready(state())
            self.close()

    def close(self) -> None:
        """End the trace, whether the run came to its last step or not."""
        if self._steps is None:
            return
        first, self._steps = self._steps[0], None
        if not self._running:
            note(f"note: there is no trace: the run ended before step {first + 1}.")
            return
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # the latter of a full disk
            note(f"note: the trace in {self._folder} is not written: {error}")
            return
        if self._show:
            folder = self._folder / "plugins" / "profile"
            say(f"Trace of steps {first + 1} to {self._done}: {folder}")

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # which would slow the steps down
        try:
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
        except RuntimeError as error:  # as when the process is being traced already
            self._steps = None
            note(f"note: there is no trace: {error}")
            return
        self._running = True
