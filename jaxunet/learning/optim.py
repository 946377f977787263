"""Optimizers and schedules, from Optax; with the defaults of `torch.optim`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxunet.config import Config, OptimizerConfig
from jaxunet.errors import ConfigError, RunError


def make_schedule(config: OptimizerConfig, total_updates: int | None) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0, then constant or cosine to 0.

    Where the run was made longer (`extended_at`), all this ends at the first of those
    updates. From there the rate stays what it was last (`hold`, and where it is constant),
    or falls by a cosine again from each of them to the next (`cycle`; Loshchilov and Hutter
    2017, arXiv:1608.03983, with cycles as long as the user made them).

    Args:
        total_updates: length of the run; None for a rate that stays at its peak.

    Raises:
        ConfigError: the run ends before its warm-up does.
    """
    rate = config.learning_rate
    if total_updates is None:
        return optax.constant_schedule(rate)
    end, *later = (*config.extended_at, total_updates)
    warmup = config.warmup_steps or min(round(config.warmup_fraction * end), end - 1)
    if warmup and warmup >= end:
        raise ConfigError(
            f"optimizer.warmup_steps is {warmup}, but the run has only {end} updates; use "
            "fewer, give optimizer.warmup_fraction instead, or train longer."
        )
    if config.schedule == "constant":
        if warmup:
            return optax.linear_schedule(0.0, rate, warmup)
        return optax.constant_schedule(rate)
    first = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, end)
    if config.extend != "cycle":
        return (lambda n: first(jnp.minimum(n, end - 1))) if later else first
    cycles = [
        optax.cosine_decay_schedule(rate, stop - start)
        for start, stop in zip(config.extended_at, later, strict=True)
        if stop > start
    ]
    return optax.join_schedules([first, *cycles], list(config.extended_at[: len(cycles)]))


def make_optimizer(
    config: OptimizerConfig, total_updates: int | None, freeze_updates: int = 0
) -> optax.GradientTransformation:
    """Gradient clipping and the optimizer, with the rate of `make_schedule`.

    Adam and AdamW (betas 0.9 and 0.999, epsilon 1e-8 added to the square root) and SGD
    with momentum take the same steps as PyTorch's. What the optimizer gives for the encoder
    is then multiplied by `encoder_rate`: for all three, and for weight decay, the same as a
    learning rate of so many times the others'.

    Args:
        freeze_updates: how many updates at first leave the encoder's weights as they are.
    """
    rate = make_schedule(config, total_updates)
    optimizer = {
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=config.weight_decay),
        "sgd": lambda: optax.sgd(rate, momentum=config.momentum),
    }[config.name]()
    parts = [optimizer]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.freeze_epochs or config.encoder_rate != 1:
        parts.append(_of_encoder(config.encoder_rate, freeze_updates))
    return optax.chain(*parts) if parts[1:] else optimizer


def _of_encoder(rate: float, freeze_updates: int) -> optax.GradientTransformation:
    """The encoder's updates times `rate`, and times 0 for the first `freeze_updates`."""

    def factor(count: Any) -> Any:
        return jnp.where(count < freeze_updates, 0.0, rate)

    def is_encoder(params: Any) -> Any:
        return {name: name == "encoder" for name in params}

    return optax.masked(optax.scale_by_schedule(factor), is_encoder)


def update_ema(ema: Any, values: Any, decay: float, updates: Int[Array, ""]) -> Any:
    """`d * ema + (1 - d) * values`, leaf by leaf, with `d = min(decay, (1 + n) / (10 + n))`.

    The decay grows with the number n of `updates`, this one included, so that the random
    weights of the start are soon forgotten, as in TensorFlow's `ExponentialMovingAverage`.
    """
    n = updates.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda e, v: e + rate * (v - e), ema, values)


def extend_schedule(
    recorded: Config, asked: Config, updates_per_epoch: int, updates_done: int
) -> Config:
    """`asked`, with what a run that was to last as long as `recorded` must keep.

    A run that has begun keeps `extend` and `extended_at`. When its length changes, the end
    of its schedule so far joins `extended_at`, unless the schedule is to be stretched.

    Raises:
        ConfigError: the rate would jump, and `asked` doesn't say how to go on.
        RunError: the run was made longer before, in another way.
    """
    old, new = recorded.optimizer, asked.optimizer
    if not updates_done:
        return asked
    ends, end = old.extended_at, recorded.train.epochs * updates_per_epoch
    extend = new.extend or old.extend
    if ends and extend != old.extend:
        raise RunError(
            f"This run was made longer by --optimizer.extend {old.extend} before, which "
            f"{extend!r} would undo; give {old.extend!r}, or leave it out."
        )
    if asked.train.epochs != recorded.train.epochs:
        constant = new.schedule == "constant"
        if not constant and extend is None:
            raise ConfigError(_how_to_go_on(recorded, asked, updates_per_epoch, updates_done))
        keeps = new.warmup_fraction > 0 if constant else extend != "stretch"
        if keeps and end > max(ends, default=0):
            ends = (*ends, end)
    return replace(asked, optimizer=replace(new, extend=extend, extended_at=ends))


def _how_to_go_on(
    recorded: Config, asked: Config, updates_per_epoch: int, updates_done: int
) -> str:
    before, after = (
        make_schedule(config.optimizer, config.train.epochs * updates_per_epoch)
        for config in (recorded, asked)
    )
    rates = float(before(updates_done - 1)), float(after(updates_done))
    return (
        f"This run's cosine reaches 0 after {recorded.train.epochs} epochs, and "
        f"train.epochs is now {asked.train.epochs}: its learning rate would jump from "
        f"{rates[0]:.3g} to {rates[1]:.3g}. Say how to go on: --optimizer.extend hold (when "
        f"the cosine ends, at its last rate), cycle (then with a new cosine, from "
        f"{asked.optimizer.learning_rate:.3g}), or stretch (with that jump, on the cosine of "
        f"{asked.train.epochs} epochs)."
    )
