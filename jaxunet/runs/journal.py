"""What is noted of a run while it trains: where it stands, log lines, the clock, the bar."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxunet.bars import Bar, say
from jaxunet.config import Config, TrainConfig
from jaxunet.devices.distributed import is_main
from jaxunet.devices.idle import Idle
from jaxunet.errors import RunError
from jaxunet.learning.optim import make_schedule
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.clock import Clock, Pace
from jaxunet.runs.evaluation import Evaluation
from jaxunet.runs.log import MetricsLog
from jaxunet.runs.throughput import Throughput
from jaxunet.runs.wandb_log import WandbLog

STEPS_IN_FLIGHT = 2  # dispatched before the loop waits for the oldest one's loss


@dataclass
class Position:
    """Where a run stands, beside the state: what a checkpoint's JSON holds."""

    loader: dict[str, Any] = field(default_factory=lambda: {"next_batch": 0})
    epoch_loss: float = 0.0  # summed over the examples of the epoch so far
    epoch_examples: float = 0.0
    evaluated_epochs: int = 0
    lines: int = 0  # of metrics.jsonl
    seconds: float = 0.0  # of training and evaluation, over all restarts
    batches_per_epoch: int | None = None  # which other data change
    shift: int = 0  # number of a batch in the order of the data, less its step
    best_score: float | None = None  # of train.best_metric, and after which epoch it rose last
    best_epoch: int = 0
    clock: dict[str, Any] = field(default_factory=dict)  # `Clock.record`, over all restarts

    def steps_until(self, epoch: int) -> int:
        """Steps done at the end of so many epochs."""
        assert self.batches_per_epoch is not None
        return self.batches_per_epoch * epoch - self.shift

    def is_over(self, train: TrainConfig) -> bool:
        """Whether all epochs are done, or `train.patience` is at its end."""
        done, waited = self.evaluated_epochs, self.evaluated_epochs - self.best_epoch
        return done >= train.epochs or 0 < train.patience <= waited


class Journal:
    """Takes in what steps give, `STEPS_IN_FLIGHT` of them later, so that none waits for it."""

    def __init__(
        self,
        run: Path,
        config: Config,
        position: Position,
        checkpoints: Checkpoints,
        fetch: Callable[[Any], Any],
        clock: Clock,
        *,
        first_step: int,
        total_steps: int,
        show: bool,
        wandb: WandbLog | None = None,
    ):
        """Args: fetch: brings a step's metrics to the host. show: say something on stderr."""
        self._config, self._position, self._checkpoints = config, position, checkpoints
        self._fetch, self._clock, self._show = fetch, clock, show
        self._total_steps = total_steps
        self._schedule = make_schedule(config.optimizer, total_steps)
        self._pending: deque[tuple[int, Any]] = deque()
        self._log = None
        if is_main():
            self._log = MetricsLog(run, keep_lines=position.lines, step=first_step, wandb=wandb)
            position.lines = self._log.lines
        self._bar: Bar[Any] = Bar("", 0, show=False)
        self._throughput = Throughput()
        self._pace = Pace(clock.seconds("evaluation", "checkpoints"))
        self._since, self._idle = clock.now(), Idle(clock.now)

    @contextmanager
    def epoch(self, step: int) -> Iterator[None]:
        """Show the progress of the epoch under way, of which `step` may lie in the middle."""
        number, per_epoch = self._position.evaluated_epochs, self._position.batches_per_epoch
        assert per_epoch is not None
        with Bar[Any](
            f"epoch {number + 1}/{self._config.train.epochs}",
            per_epoch,
            initial=step + self._position.shift - number * per_epoch,
            unit="step",
            show=self._show,
        ) as self._bar:
            self._throughput.begin()
            yield

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """A batch is awaited within; what the devices idle meanwhile is noted."""
        return self._clock.waiting_for_data(self._idle)

    def note(self, step: int, metrics: Any) -> None:
        """A step was dispatched; its metrics may still be on their way.

        Raises:
            RunError: the loss or the gradient of an earlier step is not finite.
        """
        self._pending.append((step, metrics))
        self._idle.dispatched(metrics)
        self._take_in(STEPS_IN_FLIGHT)
        self._bar.update()

    def settle(self) -> None:
        """Wait for all that is on its way."""
        self._take_in(0)

    def note_epoch(self, step: int, evaluation: Evaluation) -> float:
        """The epoch is trained and scored; its mean training loss.

        Raises:
            RunError: the validation loss is not finite.
        """
        evaluation.require_finite(step, self._config.data.validation_split)
        position = self._position
        train_loss = position.epoch_loss / position.epoch_examples
        epoch = position.evaluated_epochs + 1
        assert evaluation.loss is not None
        values = {"loss": evaluation.loss, **evaluation.scores["per_image"]}
        self._write(step, epoch, "validation", values)
        self._write(step, epoch, "train", {"epoch_mean_loss": train_loss})
        position.epoch_loss = position.epoch_examples = 0.0
        position.evaluated_epochs = epoch
        score = evaluation.scores["per_image"][self._config.train.best_metric]
        if position.best_score is None or score > position.best_score:
            position.best_score, position.best_epoch = score, epoch
        return train_loss

    def _ends_in(self, step: int) -> str:
        """When the run ends, of which `step` is done, after a comma; nothing if unknown."""
        epochs = self._config.train.epochs - self._position.evaluated_epochs
        left = self._pace.left(self._total_steps - step, epochs)
        return left and f", {left}"

    def say_epoch(self, step: int, train_loss: float, evaluation: Evaluation) -> None:
        """One line on the epoch that was noted last, and is saved."""
        self._pace.epoch(self._clock.seconds("evaluation", "checkpoints"))
        if self._show:
            per_image = evaluation.scores["per_image"]
            say(
                f"epoch {self._position.evaluated_epochs}/{self._config.train.epochs}  "
                f"step {step}  train loss {train_loss:.4f}  "
                f"validation loss {evaluation.loss:.4f}  Dice {per_image['dice']:.4f}  "
                f"IoU {per_image['iou']:.4f}  {self.seconds():.0f} s"
                f"{self._ends_in(step)}"
            )

    def seconds(self) -> float:
        """Of training and evaluation up to now, over all restarts."""
        return self._position.seconds + self._clock.now() - self._since

    def mark(self) -> None:
        """Put the time into the position, which is about to be saved."""
        self._position.seconds, self._since = self.seconds(), self._clock.now()
        self._position.clock = self._clock.record()

    def close(self) -> None:
        self._idle.close()
        if self._log is not None:
            self._log.close()

    def _take_in(self, keep: int) -> None:
        """The metrics of all but the latest `keep` steps."""
        position = self._position
        while len(self._pending) > keep:
            step, metrics = self._pending.popleft()
            values = {name: float(x) for name, x in self._fetch(metrics).items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                saved = self._checkpoints.steps()
                good = f"step {saved[-1]}" if saved else "none yet"
                raise RunError(
                    f"The loss or its gradient is not finite at step {step} (loss "
                    f"{values['loss']}, gradient norm {values['grad_norm']}). Last good "
                    f"checkpoint: {good}, in {self._checkpoints.directory}. Try a lower "
                    "--optimizer.learning-rate or --optimizer.clip-norm 1."
                )
            position.epoch_loss += values["loss"] * values["examples"]
            position.epoch_examples += values["examples"]
            self._throughput.add(values["examples"])
            self._pace.step(self._clock.seconds("data", "steps"))
            self._bar.note(f"loss={values['loss']:.4f}{self._ends_in(step)}")
            if step % self._config.train.log_every == 0:
                del values["examples"]
                values["learning_rate"] = float(self._schedule(step - 1))
                epoch, measured = position.evaluated_epochs + 1, self._throughput.measured()
                self._write(step, epoch, "train", values, measured)

    def _write(
        self,
        step: int,
        epoch: int,
        split: str,
        values: dict[str, float],
        measured: dict[str, float] | None = None,
    ) -> None:
        if self._log is not None:
            self._log.write(
                step=step,
                epoch=epoch,
                split=split,
                values=values,
                seconds=self.seconds(),
                measured=measured,
            )
        self._position.lines += 1
