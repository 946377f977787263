"""One step of training, of evaluation and of prediction: pure functions of arrays.

Each is written for one shard of the global batch, on the named axis `AXIS`;
`jaxunet.devices.strategies` spreads it over devices. A batch is a dictionary of uint8 arrays:

    image  [batch, height, width, 3]
    mask   [batch, height, width, 1]   lesion where above 0, or `IGNORED`: see `Recipe`
    weight [batch]                     1, or 0 for padding
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxunet.augmentation_config import Ranges
from jaxunet.config import Config, ModelConfig, OptimizerConfig
from jaxunet.learning.augment import Images, Masks, augment, example_keys, normalize, seed_key
from jaxunet.learning.ignoring import counted_examples, counted_pixels
from jaxunet.learning.losses import LOSSES, LossFn, lesion_logits
from jaxunet.learning.metrics import confusion_counts
from jaxunet.learning.optim import make_optimizer, update_ema
from jaxunet.learning.parts import sum_over_parts
from jaxunet.learning.views import Views, logits_at_input_size, mean_logits
from jaxunet.model.resizing import center_crop
from jaxunet.model.unet import UNet, make_unet

AXIS = "data"

Batch = dict[str, UInt8[Array, "batch ..."]]
Variables = Mapping[str, Any]
AllVariables = Variables | tuple[Variables, ...]
"""Of one network, or of each of an ensemble."""


class TrainState(struct.PyTreeNode):
    """All that training changes; what a checkpoint holds.

    The leaves are arrays on devices or the host, or what stands for them in a tree.
    """

    step: Any  # int32 scalar
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any  # averaged params, or None when the configuration asks for none
    ema_stats: Any = None  # batch_stats averaged with them, or None where either is missing

    @property
    def variables(self) -> Variables:
        """What evaluation applies the model with: averages where there are any."""
        params = self.params if self.ema is None else self.ema
        stats = self.batch_stats if self.ema_stats is None else self.ema_stats
        return {"params": params, "batch_stats": stats}


@dataclass(frozen=True)
class Recipe:
    """The static side of the steps: functions and constants, no arrays."""

    model: UNet
    optimizer: optax.GradientTransformation
    loss: LossFn
    microbatches: int
    augment: Ranges
    seed: int
    ema_decay: float | None
    threshold: float
    ignores: bool = False
    """Whether masks may hold `IGNORED`, where nothing is learnt and nothing scored."""
    views: Views = "none"
    """In which views evaluation and prediction see a picture."""
    others: tuple[UNet, ...] = ()
    """The other networks of an ensemble: `variables` then is a tuple, of one for each."""
    temperature: float = 1.0
    """What evaluation and prediction divide the logit of the averaged probability by."""


def make_recipe(
    config: Config, total_steps: int | None = None, freeze_steps: int = 0
) -> Recipe:
    """The functions that `config` names.

    Args:
        total_steps: length of the run, which the learning rate follows; None where nothing
            is learnt or only time counts: the rate then stays at its peak.
        freeze_steps: how many first steps `optimizer.freeze_epochs` are.

    Raises:
        ConfigError: the run is too short for its warm-up.
    """
    train = config.train
    return _make_recipe(
        config.model,
        config.optimizer,
        train.loss,
        train.augmentation.ranges(train.augment),
        train.seed,
        train.threshold,
        config.parts_per_step,
        total_steps,
        freeze_steps,
        config.data.ignore_value is not None,
    )


# The same functions for the same configuration: steps made of them are compiled once in a
# process (`jaxunet.devices.strategies`), be it trained, evaluated and trained again.
@lru_cache(maxsize=64)
def _make_recipe(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    loss: str,
    augment: Ranges,
    seed: int,
    threshold: float,
    microbatches: int,
    total_steps: int | None,
    freeze_steps: int,
    ignores: bool,
) -> Recipe:
    return Recipe(
        model=make_unet(model, AXIS),
        optimizer=make_optimizer(optimizer, total_steps, freeze_steps),
        loss=LOSSES[loss],
        microbatches=microbatches,
        augment=augment,
        seed=seed,
        ema_decay=optimizer.ema_decay,
        threshold=threshold,
        ignores=ignores,
    )


@partial(jax.jit, static_argnums=0)
def init_state(recipe: Recipe) -> TrainState:
    """The state before the first step, from the recipe's seed."""
    side = recipe.model.config.least_image_size
    images = jnp.zeros((1, side, side, 3))
    # Drawing every layer's weights by Threefry takes XLA five times as long to compile.
    key = seed_key(recipe.seed, impl="rbg")
    variables = recipe.model.init(key, images)
    return state_from_variables(recipe, variables)


def state_from_variables(recipe: Recipe, variables: Variables) -> TrainState:
    """A fresh state around given weights."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    averaged = recipe.ema_decay is not None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=recipe.optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if averaged else None,
        ema_stats=jax.tree.map(jnp.copy, batch_stats) if averaged and batch_stats else None,
    )


def varied(recipe: Recipe, step: Int[Array, ""], batch: Batch) -> tuple[Images, Masks]:
    """A shard's images and masks as the recipe varies them at `step`."""
    images, masks = batch["image"], batch["mask"]
    places = jax.lax.axis_index(AXIS) * len(images) + jnp.arange(len(images))
    keys = example_keys(seed_key(recipe.seed), step, places)
    return augment(recipe.augment, keys, images, masks, batch["weight"] > 0, recipe.ignores)


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update from one global batch.

    The loss is the mean over the real examples of the *global* batch, which may be computed
    in parts (`recipe.microbatches`): loss and gradient are those of the whole, and batch
    norm takes its statistics from each part. Random numbers follow seed, step and the
    example's place in the global batch. An example none of whose pixels counts is in no mean
    (but batch norm sees it).

    Returns:
        The new state, and `loss`, `grad_norm` and `examples` (how many the means are of), all
        the same on every device.
    """
    images, masks, weight = *varied(recipe, state.step, batch), batch["weight"] > 0

    def summed_loss(
        params: Any, batch_stats: Any, images: Array, masks: Array, weight: Array
    ) -> tuple[Float[Array, ""], Any]:
        logits, changed = recipe.model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize(images, recipe.model.config.encoder),
            weight,
            train=True,
            mutable=["batch_stats"],
        )
        truth = center_crop((masks > 0).astype(jnp.float32), *logits.shape[1:3])
        counted = counted_pixels(recipe.ignores, masks, logits)
        losses = recipe.loss(lesion_logits(logits), truth, counted=counted)
        return jnp.sum(losses, where=weight), changed["batch_stats"]

    loss, grads, batch_stats = sum_over_parts(
        jax.value_and_grad(summed_loss, has_aux=True),
        state.params,
        state.batch_stats,
        (images, masks, weight),
        recipe.microbatches,
    )
    counted = jnp.sum(counted_examples(recipe.ignores, masks, weight))
    loss, grads, examples = jax.lax.psum((loss, grads, counted), AXIS)
    mean = 1 / jnp.maximum(examples, 1).astype(jnp.float32)
    loss, grads = loss * mean, jax.tree.map(lambda g: g * mean, grads)

    with jax.named_scope("optimizer"):  # by which a profile knows it
        with jax.numpy_dtype_promotion("standard"):  # Adam's count is an integer among floats
            updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    ema, ema_stats = state.ema, state.ema_stats
    if recipe.ema_decay is not None:
        # None, where there is no batch norm, is a tree without leaves.
        ema, ema_stats = update_ema(
            (ema, ema_stats),
            (params, None if ema_stats is None else batch_stats),
            recipe.ema_decay,
            state.step + 1,
        )
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=ema,
        ema_stats=ema_stats,
    )
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "examples": examples.astype(jnp.float32),
    }
    return new_state, metrics


def eval_step(recipe: Recipe, variables: AllVariables, batch: Batch) -> dict[str, Array]:
    """Per-example results of one global batch, gathered on every device.

    Returns:
        `counts` int32 [global batch, 4] (true and false positives, false and true
        negatives: see `jaxunet.learning.metrics`) and `loss` float32 [global batch].
    """
    results, _, _ = _scored(recipe, variables, batch)
    return jax.lax.all_gather(results, AXIS, tiled=True)


def maps_step(recipe: Recipe, variables: AllVariables, batch: Batch) -> dict[str, Array]:
    """As `eval_step`, with the maps that its results are of.

    Returns:
        What `eval_step` does, and [global batch, height, width] each: `logits` and
        `probabilities` float32, `truth` bool, and with `Recipe.ignores` `counted` bool.
    """
    results, logits, truth = _scored(recipe, variables, batch)
    maps = {"logits": logits, "probabilities": jax.nn.sigmoid(logits), "truth": truth}
    if (counted := counted_pixels(recipe.ignores, batch["mask"], logits)) is not None:
        maps["counted"] = counted
    results |= {name: each[..., 0] for name, each in maps.items()}
    return jax.lax.all_gather(results, AXIS, tiled=True)


def _scored(
    recipe: Recipe, variables: AllVariables, batch: Batch
) -> tuple[dict[str, Array], Float[Array, "..."], Bool[Array, "..."]]:
    """Counts and loss of each example of the shard, its logits and its true mask."""
    logits, truth = _logits(recipe, variables, batch["image"]), batch["mask"] > 0
    counted = counted_pixels(recipe.ignores, batch["mask"], logits)
    results = {
        "counts": confusion_counts(jax.nn.sigmoid(logits) > recipe.threshold, truth, counted),
        "loss": recipe.loss(logits, truth.astype(jnp.float32), counted=counted),
    }
    if counted is not None:  # weights that overflow are to be seen wherever they do
        finite = jnp.isfinite(logits).all((1, 2, 3))
        results["loss"] = jnp.where(finite, results["loss"], jnp.nan)
    return results, logits, truth


def predict_step(
    recipe: Recipe, variables: AllVariables, images: UInt8[Array, "batch height width 3"]
) -> Float[Array, "batch height width 1"]:
    """Probability of lesion for each pixel of each image of the shard.

    NaN for a logit that is not finite: an overflow says nothing of the pixel.
    """
    logits = _logits(recipe, variables, images)
    return jnp.where(jnp.isfinite(logits), jax.nn.sigmoid(logits), jnp.nan)


def _logits(
    recipe: Recipe, variables: AllVariables, images: UInt8[Array, "batch height width 3"]
) -> Float[Array, "batch height width 1"]:
    """Logits for every pixel, of all networks and views together, over the temperature."""
    models = (recipe.model, *recipe.others)
    each: Any = variables if recipe.others else (variables,)
    networks = [partial(logits_at_input_size, *pair) for pair in zip(models, each, strict=True)]
    logits = mean_logits(networks, images, recipe.views)
    return logits if recipe.temperature == 1 else logits / recipe.temperature
