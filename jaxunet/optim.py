"""Optimizers and schedules, from Optax; with the defaults of `torch.optim`."""

from typing import Any

import jax
import optax

from jaxunet.config import OptimizerConfig
from jaxunet.errors import ConfigError


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0, then constant or cosine to 0.

    Args:
        total_updates: at which the cosine reaches 0.

    Raises:
        ConfigError: the warm-up leaves nothing for the cosine.
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        if warmup >= total_updates:
            raise ConfigError(
                f"optimizer.warmup_steps is {warmup}, but the run has only {total_updates} "
                "updates; use fewer, or train longer."
            )
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else rate, rate, warmup, total_updates
        )
    if warmup:
        return optax.linear_schedule(0.0, rate, warmup)
    return optax.constant_schedule(rate)


def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Gradient clipping, the optimizer, and accumulation over `accumulate_steps` batches.

    Adam and AdamW (betas 0.9 and 0.999, epsilon 1e-8 added to the square root) and SGD
    with momentum take the same steps as PyTorch's.
    """
    rate = make_schedule(config, total_updates)
    optimizer = {
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=config.weight_decay),
        "sgd": lambda: optax.sgd(rate, momentum=config.momentum),
    }[config.name]()
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.accumulate_steps > 1:
        every = optax.MultiSteps(optimizer, config.accumulate_steps)
        return every.gradient_transformation()
    return optimizer


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """`decay * ema + (1 - decay) * params`, leaf by leaf."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
