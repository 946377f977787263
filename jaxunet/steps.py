"""One step of training, of evaluation and of prediction: pure functions of arrays.

Each is written for one shard of the global batch, on the named axis `AXIS`;
`jaxunet.parallel` spreads it over devices. A batch is a dictionary of uint8 arrays:

    image  [batch, height, width, 3]
    mask   [batch, height, width, 1]   lesion where above 0
    weight [batch]                     1, or 0 for padding
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, UInt8

from jaxunet.augment import example_keys, normalize, random_flip
from jaxunet.config import Config
from jaxunet.losses import LOSSES, LossFn, lesion_logits
from jaxunet.metrics import confusion_counts
from jaxunet.optim import make_optimizer, update_ema
from jaxunet.unet import UNet, center_crop, make_unet

AXIS = "data"

Batch = dict[str, UInt8[Array, "batch ..."]]
Variables = Mapping[str, Any]


class TrainState(struct.PyTreeNode):
    """All that training changes; what a checkpoint holds.

    The leaves are arrays on devices or the host, or what stands for them in a tree.
    """

    step: Any  # int32 scalar
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any  # averaged params, or None when the configuration asks for none

    @property
    def variables(self) -> Variables:
        """What evaluation applies the model with: averaged weights where there are any."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "batch_stats": self.batch_stats}


@dataclass(frozen=True)
class Recipe:
    """The static side of the steps: functions and constants, no arrays."""

    model: UNet
    optimizer: optax.GradientTransformation
    loss: LossFn
    flip: bool
    seed: int
    ema_decay: float | None
    threshold: float


def make_recipe(config: Config, total_steps: int) -> Recipe:
    """The functions that `config` names; `total_steps` is the length of its schedule."""
    updates = max(1, total_steps // config.optimizer.accumulate_steps)
    return Recipe(
        model=make_unet(config.model, AXIS),
        optimizer=make_optimizer(config.optimizer, updates),
        loss=LOSSES[config.train.loss],
        flip=config.train.augment == "flip",
        seed=config.train.seed,
        ema_decay=config.optimizer.ema_decay,
        threshold=config.train.threshold,
    )


def init_state(recipe: Recipe) -> TrainState:
    """The state before the first step, from the recipe's seed."""
    side = recipe.model.config.least_image_size
    images = jnp.zeros((1, side, side, 3))
    # Drawing every layer's weights by Threefry takes XLA five times as long to compile.
    key = jax.random.key(recipe.seed, impl="rbg")
    variables = recipe.model.init(key, images)
    return state_from_variables(recipe, variables)


def state_from_variables(recipe: Recipe, variables: Variables) -> TrainState:
    """A fresh state around given weights."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=recipe.optimizer.init(params),
        ema=None if recipe.ema_decay is None else jax.tree.map(jnp.copy, params),
    )


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update from one global batch.

    The loss is the mean over the real examples of the *global* batch. Random numbers
    follow seed, step and the example's place in the global batch.

    Returns:
        The new state, and `loss`, `grad_norm` and `examples` (the sum of weights), all the
        same on every device.
    """
    images, masks, weight = batch["image"], batch["mask"], batch["weight"] > 0
    if recipe.flip:
        first = jax.lax.axis_index(AXIS) * len(images)
        places = first + jnp.arange(len(images))
        keys = example_keys(jax.random.key(recipe.seed), state.step, places)
        images, masks = random_flip(keys, images, masks)

    def summed_loss(params: Any) -> tuple[Float[Array, ""], Any]:
        logits, changed = recipe.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(images),
            weight,
            train=True,
            mutable=["batch_stats"],
        )
        truth = center_crop((masks > 0).astype(jnp.float32), *logits.shape[1:3])
        losses = recipe.loss(lesion_logits(logits), truth)
        return jnp.sum(losses, where=weight), changed.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(summed_loss, has_aux=True)(state.params)
    loss, grads, examples = jax.lax.psum((loss, grads, jnp.sum(weight)), AXIS)
    mean = 1 / jnp.maximum(examples, 1).astype(jnp.float32)
    loss, grads = loss * mean, jax.tree.map(lambda g: g * mean, grads)

    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if recipe.ema_decay is not None:
        ema = update_ema(ema, params, recipe.ema_decay)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=ema,
    )
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "examples": examples.astype(jnp.float32),
    }
    return new_state, metrics


def eval_step(recipe: Recipe, variables: Variables, batch: Batch) -> dict[str, Array]:
    """Per-example results of one global batch, gathered on every device.

    Returns:
        `counts` int32 [global batch, 4] (true and false positives, false and true
        negatives: see `jaxunet.metrics`) and `loss` float32 [global batch].
    """
    logits = _logits_at_input_size(recipe, variables, batch["image"])
    truth = batch["mask"] > 0
    results = {
        "counts": confusion_counts(jax.nn.sigmoid(logits) > recipe.threshold, truth),
        "loss": recipe.loss(logits, truth.astype(jnp.float32)),
    }
    return jax.lax.all_gather(results, AXIS, tiled=True)


def predict_step(
    recipe: Recipe, variables: Variables, images: UInt8[Array, "batch height width 3"]
) -> Float[Array, "batch height width 1"]:
    """Probability of lesion for each pixel of each image of the shard."""
    return jax.nn.sigmoid(_logits_at_input_size(recipe, variables, images))


def _logits_at_input_size(
    recipe: Recipe, variables: Variables, images: UInt8[Array, "batch height width 3"]
) -> Float[Array, "batch height width 1"]:
    """Logits for every pixel: a cropped border repeats the nearest logit, so all count."""
    output: Any = recipe.model.apply(variables, normalize(images))
    logits = lesion_logits(output)
    rows, columns = (a - b for a, b in zip(images.shape[1:3], logits.shape[1:3], strict=True))
    if not rows and not columns:
        return logits
    border = (
        (0, 0),
        (rows // 2, rows - rows // 2),
        (columns // 2, columns - columns // 2),
        (0, 0),
    )
    return jnp.pad(logits, border, mode="edge")
