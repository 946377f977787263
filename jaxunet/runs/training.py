"""The training loop: joins the pure steps with data, devices, checkpoints and logs."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxunet.bars import Bar, say
from jaxunet.config import Config, to_dict
from jaxunet.data.order import Order
from jaxunet.data.prepare import Prepared
from jaxunet.devices.distributed import is_main
from jaxunet.devices.feed import Feed
from jaxunet.devices.startup import say_if_loops_are_off
from jaxunet.devices.strategies import Strategy, check_divisible, make_strategy
from jaxunet.errors import RunError, Stopped
from jaxunet.files import write_json
from jaxunet.learning.optim import make_schedule
from jaxunet.learning.steps import TrainState, eval_step, init_state, make_recipe, train_step
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.evaluation import Evaluation, check_hosts, describe_split, evaluate, report
from jaxunet.runs.loading import compile_probabilities
from jaxunet.runs.log import MetricsLog
from jaxunet.runs.reporting import write_figures
from jaxunet.runs.stopping import StopVote, stop_requests

STEPS_IN_FLIGHT = 2  # dispatched before the loop waits for the oldest one's loss


@dataclass
class Progress:
    """Where a run stands, beside the state: what a checkpoint's JSON holds."""

    loader: dict[str, Any] = field(default_factory=lambda: {"next_batch": 0})
    epoch_loss: float = 0.0  # summed over the examples of the epoch so far
    epoch_examples: float = 0.0
    evaluated_epochs: int = 0
    lines: int = 0  # of metrics.jsonl
    seconds: float = 0.0  # of training and evaluation, over all restarts
    batches_per_epoch: int | None = None  # which other data change
    shift: int = 0  # number of a batch in the order of the data, less its step


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the final state on the host, summary.json, pictures."""

    state: TrainState
    summary: dict[str, Any]
    pictures: list[Path]


class Trainer:
    """One run of training in one run directory."""

    def __init__(
        self,
        config: Config,
        data: Prepared,
        run: RunDirectory,
        *,
        parallel: Literal["pmap", "jit"] = "pmap",
        show_progress: bool = True,
        accept_other_data: bool = False,
    ):
        check_hosts(config, data)
        run.check_data(
            describe_split(data, config.data.train_split, config.data.image_size),
            accept=accept_other_data,
        )
        devices = len(jax.devices())
        check_divisible("train.batch_size", config.train.batch_size, devices)
        check_divisible("train.eval_batch_size", config.train.eval_batch_size, devices)
        self.data, self.run = data, run
        self.show_progress = show_progress and is_main()
        if is_main():
            say_if_loops_are_off()
        self.strategy: Strategy = make_strategy(parallel)
        self.own_strategy: Strategy = make_strategy(parallel, jax.local_devices())
        self.train_feed, self.validation_feed = (
            Feed(self.strategy, data.source(split), config.data, progress=self.show_progress)
            for split in (config.data.train_split, config.data.validation_split)
        )
        self.order = Order(
            len(self.train_feed),
            config.examples_per_step,
            config.train.seed,
            jax.process_index(),
            jax.process_count(),
        )
        self.config = run.extend(self.order.batches_per_epoch)
        self.progress = Progress(batches_per_epoch=self.order.batches_per_epoch)
        self.first_step = 0
        self._plan()

    def _plan(self) -> None:
        """Everything that follows from how many steps there are."""
        config = self.config
        batches = self.order.batches_per_epoch * config.train.epochs
        self.total_steps = batches - self.progress.shift
        self.recipe = make_recipe(config, self.total_steps)
        self.schedule = make_schedule(config.optimizer, self.total_steps)
        self.train_step = self.train_feed.compile(
            partial(train_step, self.recipe), outputs="replicated", donate=True
        )
        self.eval_step = self.validation_feed.compile(
            partial(eval_step, self.recipe), outputs="replicated"
        )
        self.batches = self.train_feed.batches(self.order, batches)

    def train(self) -> Outcome:
        """Train to the last epoch, from the latest checkpoint if there is one.

        Raises:
            Stopped: a signal came; the state is saved.
            RunError: the loss is not finite, or the checkpoints don't fit.
        """
        self.checkpoints = Checkpoints(
            self.run.path / "checkpoints", self.config.train.best_metric
        )
        try:
            state = self._restore()
            self.run.write_config()
            self.log = self._open_log()
            try:
                with stop_requests() as received:
                    self.stop = StopVote(self.strategy, received)
                    return self._loop(state)
            finally:
                if self.log is not None:
                    self.log.close()
        finally:
            self.batches.close()
            self.checkpoints.close()

    def _restore(self) -> Any:
        host = jax.tree.map(np.asarray, jax.jit(partial(init_state, self.recipe))())
        self._has_checkpoints = bool(self.checkpoints.steps())
        if self._has_checkpoints:
            step, host, progress = self.checkpoints.restore("latest", host)
            progress.pop("config")
            self.progress = Progress(**progress)
            self.first_step = step
            self._take_up_order()
            if step > self.total_steps:
                raise RunError(
                    f"The run has done {step} steps, but train.epochs "
                    f"{self.config.train.epochs} is only {self.total_steps}; ask for more."
                )
        return self.strategy.replicate(host)

    def _take_up_order(self) -> None:
        """Go on in the order of the examples where the run is; other data, whose epochs have
        another length, begin with an epoch."""
        per_epoch, shift = self.order.batches_per_epoch, self.progress.shift
        if self.progress.batches_per_epoch not in (None, per_epoch):
            next_batch = self.progress.evaluated_epochs * per_epoch
            self.progress.loader = {"next_batch": next_batch}
            self.progress.epoch_loss = self.progress.epoch_examples = 0.0
            self.progress.shift = next_batch - self.first_step
        self.progress.batches_per_epoch = per_epoch
        if self.progress.shift != shift or shift:
            self._plan()
        self.batches.set_state(self.progress.loader)

    def _loop(self, state: Any) -> Outcome:
        self._clock = time.perf_counter()
        per_epoch = self.order.batches_per_epoch
        # Without compilation every constant of a step is a transfer of its own.
        guard = "allow" if jax.config.jax_disable_jit else "disallow"
        evaluation: Evaluation | None = None
        step = self.first_step
        self._losses: deque[tuple[int, Any]] = deque()
        while self.progress.evaluated_epochs < self.config.train.epochs:
            epoch = self.progress.evaluated_epochs
            last = (epoch + 1) * per_epoch - self.progress.shift
            with Bar[Any](
                f"epoch {epoch + 1}/{self.config.train.epochs}",
                per_epoch,
                initial=per_epoch - (last - step),
                unit="step",
                show=self.show_progress,
            ) as bar:
                while step < last:
                    batch = next(self.batches)
                    with jax.transfer_guard(guard):  # but for what is asked for
                        state, metrics = self.train_step(state, self.train_feed.place(batch))
                    step += 1
                    self._losses.append((step, metrics))
                    self._collect(STEPS_IN_FLIGHT, bar)
                    bar.update()
                    every, stop = self.config.train.checkpoint_every, self.stop()
                    if stop or (every and step % every == 0 and step < last):
                        self._collect(0, bar)
                        self._save(state)
                    self._raise_if(stop, step)
                self._collect(0, bar)
            evaluation = self._evaluate(state, epoch, step)
            self._raise_if(self.stop(), step)
        if evaluation is None:  # resumed after the last epoch was already evaluated
            evaluation = self._run_eval_step(state)
        summary = self._finish(evaluation, step)
        host = self.strategy.fetch(state)
        pictures = self._draw(host, evaluation)
        return Outcome(host, summary, pictures)

    def _collect(self, keep: int, bar: Any) -> None:
        """Take in the metrics of all but the latest `keep` steps."""
        while len(self._losses) > keep:
            step, metrics = self._losses.popleft()
            values = {name: float(x) for name, x in self.strategy.fetch(metrics).items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                saved = self.checkpoints.steps()
                good = f"step {saved[-1]}" if saved else "none yet"
                raise RunError(
                    f"The loss or its gradient is not finite at step {step} (loss "
                    f"{values['loss']}, gradient norm {values['grad_norm']}). Last good "
                    f"checkpoint: {good}, in {self.checkpoints.directory}. Try a lower "
                    "--optimizer.learning-rate or --optimizer.clip-norm 1."
                )
            self.progress.epoch_loss += values["loss"] * values["examples"]
            self.progress.epoch_examples += values["examples"]
            bar.note(f"loss={values['loss']:.4f}")
            if step % self.config.train.log_every == 0:
                self._write(
                    step,
                    (step - 1 + self.progress.shift) // self.order.batches_per_epoch + 1,
                    "train",
                    {
                        "loss": values["loss"],
                        "grad_norm": values["grad_norm"],
                        "learning_rate": float(self.schedule(step - 1)),
                    },
                )

    def _open_log(self) -> MetricsLog | None:
        if not is_main():
            return None
        log = MetricsLog(self.run.path, keep_lines=self.progress.lines, step=self.first_step)
        self.progress.lines = log.lines
        return log

    def _write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(
                step=step, epoch=epoch, split=split, values=values, seconds=self._seconds()
            )
        self.progress.lines += 1

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self._clock

    def _save(self, state: Any, metrics: dict[str, float] | None = None) -> None:
        seconds = self._seconds()
        self.progress.seconds, self._clock = seconds, time.perf_counter()
        self.progress.loader = self.batches.get_state()
        record = {**vars(self.progress), "config": to_dict(self.config)}
        self.checkpoints.save(self.strategy.fetch(state), record, metrics)
        if not self._has_checkpoints:
            self.checkpoints.wait()
            self.run.write_config()  # which says that there is one
            self._has_checkpoints = True

    def _raise_if(self, stop: int, step: int) -> None:
        if stop:
            self.checkpoints.wait()
            name = signal.Signals(stop).name
            raise Stopped(
                f"Stopped by {name} after step {step} of {self.total_steps}, which is saved. "
                f"Go on with the same command and --resume --out {self.run.path}.",
                stop,
            )

    def _run_eval_step(
        self, state: Any, check_stop: Callable[[], None] = lambda: None
    ) -> Evaluation:
        return evaluate(
            self.validation_feed,
            self.eval_step,
            state.variables,
            self.config,
            progress=self.show_progress,
            check_stop=check_stop,
        )

    def _evaluate(self, state: Any, epoch: int, step: int) -> Evaluation:
        def check_stop() -> None:
            if stop := self.stop():
                self._save(state)
                self._raise_if(stop, step)

        evaluation = self._run_eval_step(state, check_stop)
        train_loss = self.progress.epoch_loss / self.progress.epoch_examples
        per_image = evaluation.scores["per_image"]
        self._write(step, epoch + 1, "validation", {"loss": evaluation.loss, **per_image})
        self._write(step, epoch + 1, "train", {"epoch_mean_loss": train_loss})
        self.progress.epoch_loss = self.progress.epoch_examples = 0.0
        self.progress.evaluated_epochs = epoch + 1
        self._save(state, per_image)
        if self.show_progress:
            say(
                f"epoch {epoch + 1}/{self.config.train.epochs}  step {step}  "
                f"train loss {train_loss:.4f}  validation loss {evaluation.loss:.4f}  "
                f"Dice {per_image['dice']:.4f}  IoU {per_image['iou']:.4f}  "
                f"{self._seconds():.0f} s"
            )
        return evaluation

    def _dataset(self, split: str) -> dict[str, Any]:
        return describe_split(self.data, split, self.config.data.image_size)

    def _finish(self, evaluation: Evaluation, step: int) -> dict[str, Any]:
        self.checkpoints.wait()
        seconds = self._seconds()
        summary = report(
            evaluation,
            dataset=self._dataset(self.config.data.validation_split),
            step=step,
            epoch=self.config.train.epochs,
            wall_seconds=seconds,
            images_per_second=len(self.train_feed) * self.config.train.epochs / seconds,
        )
        summary["best"] = {
            "metric": self.config.train.best_metric,
            "step": self.checkpoints.step_of("best"),
        }
        if is_main():
            write_json(self.run.path / "summary.json", summary)
        return summary

    def _draw(self, state: TrainState, evaluation: Evaluation) -> list[Path]:
        if not is_main():
            return []
        dataset = self._dataset(self.config.data.validation_split)
        return write_figures(
            self.run.path,
            compile_probabilities(self.own_strategy, self.recipe, state.variables),
            evaluation.counts,
            self.validation_feed.source,
            image_size=self.config.data.image_size,
            batch_size=self.config.train.eval_batch_size,
            threshold=self.config.train.threshold,
            title=f"{dataset['name']} {dataset['split']}, after {self.config.train.epochs} "
            f"epochs: mean Dice {evaluation.scores['per_image']['dice']:.3f}",
        )


def train(
    config: Config,
    data: Prepared,
    out: Path,
    *,
    resume: bool = False,
    parallel: Literal["pmap", "jit"] = "pmap",
    show_progress: bool = True,
    accept_other_data: bool = False,
) -> Outcome:
    """Train `config` on `data` in the run directory `out`; see `Trainer.train`.

    Args:
        resume: go on with the run in `out`, if there is one.
        accept_other_data: go on with other data than the run was trained on, and record it.
    """
    with RunDirectory(out, config, resume=resume) as run:
        trainer = Trainer(
            config,
            data,
            run,
            parallel=parallel,
            show_progress=show_progress,
            accept_other_data=accept_other_data,
        )
        return trainer.train()
