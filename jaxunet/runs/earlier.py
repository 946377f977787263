"""The training state as checkpoints hold it, and as earlier versions wrote it.

before 2026-11-28    no `ema_stats`; with `accumulate_steps` a step was one part of a
                     batch, and the optimizer's state held gradients
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from jaxunet.errors import RunError
from jaxunet.learning.steps import TrainState


def stored(state: TrainState) -> dict[str, Any]:
    """The fields of a checkpoint: `ema_stats` is one only where there are any."""
    fields = dict(vars(state))
    if state.ema_stats is None:
        del fields["ema_stats"]
    return fields


def forms(like: TrainState) -> Iterator[TrainState]:
    """`like`, then what stands in its place in checkpoints of earlier versions."""
    yield like
    without = like.replace(ema_stats=None)
    if like.ema_stats is not None:
        yield without
    number = np.zeros((), np.int32)
    yield without.replace(
        opt_state=optax.MultiStepsState(
            mini_step=number,
            gradient_step=number,
            inner_opt_state=like.opt_state,
            acc_grads=like.params,
            skip_state=(),
        )
    )


def current(state: TrainState, *, to_go_on: bool) -> TrainState:
    """A state of any of the `forms` in that of today.

    Args:
        to_go_on: whether it is to be trained on, not only applied.

    Raises:
        RunError: it can't be trained on.
    """
    if isinstance(state.opt_state, optax.MultiStepsState):
        if to_go_on:
            raise RunError(
                "This run is of an earlier version of jaxunet, whose steps with "
                "optimizer.accumulate_steps were each a part of a batch. It can be evaluated "
                "and predicted with, but not resumed: train anew with another --out."
            )
        state = state.replace(opt_state=state.opt_state.inner_opt_state)
    if state.ema is not None and state.ema_stats is None and state.batch_stats:
        state = state.replace(ema_stats=jax.tree.map(np.copy, state.batch_stats))
    return state
