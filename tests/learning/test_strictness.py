"""JAX's stricter modes, which careful users switch on, stop at no line of the steps."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.devices.strategies import make_strategy
from jaxunet.learning.losses import LOSSES
from jaxunet.learning.steps import (
    init_state,
    make_recipe,
    maps_step,
    predict_step,
    train_step,
)

PLAIN = Config(data=DataConfig(image_size=9), model=ModelConfig(width=2, depth=2))
BATCH_NORM = Config(
    data=DataConfig(image_size=9),
    model=ModelConfig(width=2, depth=2, norm="batch", upsampling="bilinear", num_logits=2),
    optimizer=OptimizerConfig(
        name="adamw", schedule="cosine", warmup_fraction=0.2, clip_norm=1.0, ema_decay=0.9,
        accumulate_steps=2, extend="cycle", extended_at=(3,),
    ),
    train=TrainConfig(loss="bce_dice", seed=2**40),
)  # fmt: skip
CONFIGS = {
    "plain": PLAIN,
    "batch norm": BATCH_NORM,
    "group norm": replace(
        PLAIN,
        model=ModelConfig(width=2, depth=2, norm="group", dtype="bfloat16", skip="pad"),
        optimizer=OptimizerConfig(name="sgd", warmup_steps=2, extend="hold", extended_at=(4,)),
    ),
    "remat": replace(PLAIN, model=ModelConfig(width=2, depth=2, remat=True, init="he")),
}


def lower_steps(config: Config) -> None:
    """Trace every step; what JAX refuses it refuses there."""
    recipe = make_recipe(config, total_steps=6)
    strategy = make_strategy("jit", jax.devices()[:1])
    state = jax.eval_shape(partial(init_state, recipe))
    batch = {
        "image": np.zeros((4, 9, 9, 3), np.uint8),
        "mask": np.zeros((4, 9, 9, 1), np.uint8),
        "weight": np.ones(4, np.uint8),
    }
    for step, arguments in (
        (train_step, (state, batch)),
        (maps_step, (state.variables, batch)),  # all of eval_step, and more
        (predict_step, (state.variables, batch["image"])),
    ):
        strategy.compile(partial(step, recipe), outputs="replicated").lower(*arguments)


MODES = {
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_is_traced_without_implicit_promotion(name, mode):
    with MODES[mode]():
        lower_steps(CONFIGS[name])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_traced_without_implicit_promotion(name, mode):
    logits = mask = jax.ShapeDtypeStruct((2, 3, 4, 1), np.float32)
    with MODES[mode]():
        jax.eval_shape(jax.grad(lambda x, y: LOSSES[name](x, y).sum()), logits, mask)
