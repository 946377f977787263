"""The training loop: joins the pure steps with data, devices, checkpoints and logs."""

import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax

from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.data.prepare import Prepared
from jaxunet.data.sampler import BatchSampler
from jaxunet.devices import tuning
from jaxunet.devices.compiling import Compilation
from jaxunet.devices.distributed import is_main
from jaxunet.devices.feed import Feed
from jaxunet.devices.startup import say_if_loops_are_off
from jaxunet.devices.strategies import check_divisible, make_strategy
from jaxunet.files import write_json
from jaxunet.learning.steps import TrainState, eval_step, make_recipe, train_step
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.clock import Clock
from jaxunet.runs.directory import RunDirectory
from jaxunet.runs.evaluation import Evaluation, check_hosts, describe_split, evaluate, report
from jaxunet.runs.journal import Journal, Position
from jaxunet.runs.loading import compile_masks
from jaxunet.runs.reporting import Outcome, write_figures, write_summary
from jaxunet.runs.starting import Given, latest, say_what_both_splits_hold, start
from jaxunet.runs.stopping import StopVote, stop_requests, stopped
from jaxunet.runs.watching import NOT_WATCHED, Watch


class Trainer:
    """One run, from where its directory stands to its last epoch.

    What moves is `state`, `step`, `position` and `saved`; all else stands once it is made.

    Attributes:
        batches: those that are left to train on.
        first_step: how many steps the run had done before.
    """

    def __init__(
        self,
        config: Config,
        data: Prepared,
        run: RunDirectory,
        *,
        parallel: Literal["pmap", "jit"] = "pmap",
        show_progress: bool = True,
        accept_other_data: bool = False,
        init_from: Given | None = None,
        deadline: float | None = None,
        watch: Watch = NOT_WATCHED,
        started: float | None = None,
    ):
        self.clock = Clock(started)
        check_hosts(config, data)
        self.other_data = run.check_data(
            describe_split(data, config.data.train_split, config.data.image_size),
            accept=accept_other_data,
        )
        devices = len(jax.devices())
        check_divisible("train.batch_size", config.train.batch_size, devices)
        self.eval_batch_size = tuning.eval_batch_size(config.train)
        check_divisible("train.eval_batch_size", self.eval_batch_size, devices)
        check_divisible("train.microbatch", config.train.microbatch or devices, devices)
        self.data, self.run, self.deadline, self.watch = data, run, deadline, watch
        self.show_progress = show_progress and is_main()
        if is_main():
            say_if_loops_are_off()
        say_what_both_splits_hold(data, config.data, show=self.show_progress)
        self.strategy = make_strategy(parallel)
        self.own_strategy = make_strategy(parallel, jax.local_devices())
        feed = partial(Feed, self.strategy)
        self.train_feed, self.validation_feed = (
            feed(data.source(split), config.data, progress=self.show_progress, fill=False)
            for split in (config.data.train_split, config.data.validation_split)
        )
        self.order = BatchSampler(
            len(self.train_feed),
            config.examples_per_step,
            config.train.seed,
            jax.process_index(),
            jax.process_count(),
        )
        self.config = config = run.extend(self.order.batches_per_epoch)
        self.checkpoints = Checkpoints(run.path / "checkpoints", config.train.best_metric)
        with ExitStack() as undo:
            undo.callback(self.checkpoints.close)
            undo.enter_context(self.clock.compiling())
            self.saved = False  # by this process
            self.step, self.state, self.position = self._restore(init_from)
            self.first_step, seconds = self.step, self.position.seconds
            self.clock.add(self.position.clock, undivided=seconds, lost=run.lost(seconds))
            self.total_steps = self.position.steps_until(config.train.epochs)
            self.trace = watch.trace(run.path, self.step, self.total_steps, self.show_progress)
            self.recipe = make_recipe(config)  # for all but the learning rate
            frozen = self.position.steps_until(config.optimizer.freeze_epochs)
            self.train_step = self.train_feed.compile(
                partial(train_step, make_recipe(config, self.total_steps, frozen)),
                outputs="replicated",
                donate=True,
            )
            evaluated = partial(eval_step, self.recipe)
            self.eval_step = self.validation_feed.compile(evaluated, outputs="replicated")
            self._compilation = Compilation(
                "the train and eval steps",
                lambda: self.train_feed.lower(
                    self.train_step, self.state, config.examples_per_step
                ),
                lambda: self.validation_feed.lower(
                    self.eval_step, self.state.variables, self.eval_batch_size
                ),
                show=self.show_progress,
            )
            self.train_feed.fill()  # meanwhile
            self.validation_feed.fill()
            self.batches = self.train_feed.batches(
                self.order, self.total_steps + self.position.shift
            )
            self.batches.set_state(self.position.loader)
            self._close = undo.pop_all()

    def train(self) -> Outcome:
        """Train to the last epoch, from the latest checkpoint if there is one.

        Raises:
            Stopped: a signal came; the state is saved.
            RunError: the loss is not finite, or the checkpoints don't fit.
        """
        with self._close, closing(self.batches), closing(self.trace):
            self.run.write_config(at_risk=self.clock.now() - self.clock.started)
            if self.other_data:
                self.checkpoints.forget_scores()
            journal = Journal(
                self.run.path,
                self.config,
                self.position,
                self.checkpoints,
                self.strategy.fetch,
                self.clock,
                first_step=self.first_step,
                total_steps=self.total_steps,
                show=self.show_progress,
                wandb=self.watch.wandb_log(self.run.path, self.config),
            )
            with closing(journal), stop_requests() as received:
                with self.clock.span("compilation"):
                    self._compilation.finish()
                evaluation = self._train(
                    journal, StopVote(self.strategy, received, self.deadline)
                )
                return self._finish(journal, evaluation)

    def _train(self, journal: Journal, stop_vote: StopVote) -> Evaluation:
        evaluation: Evaluation | None = None
        # Without compilation every constant of a step is a transfer of its own.
        settings: Any = jax.config
        guard = "allow" if settings.jax_disable_jit else "disallow"
        self.clock.turn("steps")
        while not self.position.is_over(self.config.train):
            last = self.position.steps_until(self.position.evaluated_epochs + 1)
            with journal.epoch(self.step):
                while self.step < last:
                    with self.trace.step(self.step, lambda: self.state):
                        with journal.waiting_for_data():
                            batch = next(self.batches)
                        with jax.transfer_guard(guard):  # but for what is asked for
                            placed = self.train_feed.place(batch)
                            self.state, metrics = self.train_step(self.state, placed)
                    self.step += 1
                    journal.note(self.step, metrics)
                    stop = stop_vote()
                    if stop or self._is_due(last):
                        journal.settle()
                        self._save(journal)
                    if stop:
                        self._stop(stop)
                journal.settle()
            evaluation = self._evaluate(journal, stop_vote)
            train_loss = journal.note_epoch(self.step, evaluation)
            self._save(journal, evaluation.scores["per_image"])
            journal.say_epoch(self.step, train_loss, evaluation)
            if stop := stop_vote():
                self._stop(stop)
        # Resumed after the last epoch was evaluated, there is no evaluation yet.
        return evaluation or self._evaluate(journal)

    def _restore(self, init_from: Given | None) -> tuple[int, TrainState, Position]:
        """Steps done, the state on the devices, and the position; from the start if need be."""
        per_epoch = self.order.batches_per_epoch
        if self.checkpoints.steps():
            step, state, position = latest(
                self.checkpoints, self.config, per_epoch, other_data=self.other_data
            )
        else:
            recipe, show = make_recipe(self.config), self.show_progress
            begun = start(recipe, self.config.model, init_from, show=show)
            self.run.begin(begun.weights, begun.init_from)
            step, state, position = 0, begun.state, Position(batches_per_epoch=per_epoch)
        return step, self.strategy.replicate(state), position

    def _is_due(self, last: int) -> bool:
        """Whether to save in the middle of an epoch; at its end it is saved anyway."""
        every = self.config.train.checkpoint_every
        return bool(every) and self.step % every == 0 and self.step < last

    def _evaluate(self, journal: Journal, stop_vote: StopVote | None = None) -> Evaluation:
        def check_stop() -> None:
            if stop_vote and (stop := stop_vote()):
                self._save(journal)
                self._stop(stop)

        with self.clock.span("evaluation"):
            return evaluate(
                self.validation_feed,
                self.eval_step,
                self.state.variables,
                self.config,
                progress=self.show_progress,
                check_stop=check_stop,
            )

    def _save(self, journal: Journal, metrics: dict[str, float] | None = None) -> None:
        journal.mark()
        with self.clock.span("checkpoints"):
            self.position.loader = self.batches.get_state()
            record = {**vars(self.position), "config": to_dict(self.config)}
            self.checkpoints.save(self.strategy.fetch(self.state), record, metrics)
            if not self.saved:
                self.checkpoints.wait()
                self.run.write_config()  # which says that there is one
                self.saved = True
            if is_main():
                tuning.keep(self.run.path)

    def _stop(self, number: int) -> NoReturn:
        self.checkpoints.wait()
        raise stopped(number, self.step, self.total_steps, self.run.path)

    def _finish(self, journal: Journal, evaluation: Evaluation) -> Outcome:
        """Write summary.json and the figures."""
        self.clock.turn("checkpoints")
        self.checkpoints.wait()
        if not self.saved:  # nothing was left to do, and nothing is lost
            self.run.write_config()
        self.clock.turn("figures")
        train, data, seconds = self.config.train, self.config.data, journal.seconds()
        summary = report(
            evaluation,
            dataset=describe_split(self.data, data.validation_split, data.image_size),
            step=self.step,
            epoch=(epochs := self.position.evaluated_epochs),
            wall_seconds=seconds,
            images_per_second=len(self.train_feed) * epochs / seconds,
        )
        best = self.checkpoints.step_of("best")
        summary["best"] = {"metric": train.best_metric, "step": best}
        host = self.strategy.fetch(self.state)
        summary["time"] = self.clock.record()
        if not is_main():
            return Outcome(host, summary, [])
        write_summary(self.run.path, summary)
        pictures = write_figures(
            self.run.path,
            compile_masks(self.own_strategy, self.recipe, host.variables),
            evaluation.counts,
            self.validation_feed.source,
            self.config,
            summary,
        )
        summary["time"] = self.clock.record()  # the pictures', too
        write_json(self.run.path / "summary.json", summary)
        return Outcome(host, summary, pictures)


def train(
    config: Config,
    data: Prepared,
    out: Path | str,
    *,
    resume: bool = False,
    parallel: Literal["pmap", "jit"] = "pmap",
    show_progress: bool = True,
    accept_other_data: bool = False,
    init_from: Given | None = None,
    deadline: float | None = None,
    watch: Watch = NOT_WATCHED,
    started: float | None = None,
) -> Outcome:
    """Train `config` on `data` in the run directory `out`; see `Trainer.train`.

    >>> outcome = jaxunet.train(config, jaxunet.prepare(config.data), "runs/a")
    >>> outcome.summary["scores"]["per_image"]["dice"]

    Args:
        resume: go on with the run in `out`, if there is one.
        accept_other_data: go on with other data than the run was trained on, and record it.
        init_from: weights to start from where the run has no checkpoint yet.
        deadline: time of `time.monotonic` at which to save and stop.
        watch: what to have beyond the run's own files.
        started: when the run's start began, by the same clock; see `jaxunet.runs.clock`.
    """
    started = time.monotonic() if started is None else started
    with RunDirectory(Path(out), config, resume=resume) as run:
        return Trainer(
            config,
            data,
            run,
            parallel=parallel,
            show_progress=show_progress,
            accept_other_data=accept_other_data,
            init_from=init_from,
            deadline=deadline,
            watch=watch,
            started=started,
        ).train()
