"""The reference protocol in PyTorch, on exactly what jaxunet trains on.

The same initial weights, the same order of examples and the same flips: what is left to
differ is the two frameworks' arithmetic.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F

from jaxunet.bars import Bar
from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.data.reader import DataSource
from jaxunet.data.sampler import PADDING, BatchSampler
from jaxunet.devices import tuning
from jaxunet.devices.feed import read_all
from jaxunet.errors import ConfigError
from jaxunet.interop.pytorch import state_dict_from_variables
from jaxunet.interop.pytorch_unet import counts_and_losses, make_pytorch_unet
from jaxunet.learning.augment import example_keys, seed_key
from jaxunet.learning.metrics import scores
from jaxunet.learning.optim import make_schedule
from jaxunet.learning.steps import init_state, make_recipe
from jaxunet.provenance import disagreement

Split = dict[str, torch.Tensor]
"""`image` [n, s, s, 3] and `mask` [n, s, s, 1], uint8, on the device."""


@dataclass(frozen=True)
class Training:
    """What one framework did.

    Attributes:
        losses: of every step, in order.
        epochs: for each epoch `train_loss`, `loss` on the validation split, and `scores`.
        seconds: wall time, evaluation and compilation included, reading the images not.
        images_per_second: training images over that time.
    """

    losses: list[float]
    epochs: list[dict[str, Any]]
    seconds: float
    images_per_second: float


# What, beside the data, may differ from the reference: both sides follow it, or it changes no
# number. Any other field must have its default, so a new one is refused until both follow it.
FOLLOWED = (
    "model.width",
    "model.depth",
    "model.init",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.warmup_fraction",
    "train.epochs",
    "train.batch_size",
    "train.eval_batch_size",
    "train.augment",
    "train.threshold",
    "train.seed",
    "train.checkpoint_every",
    "train.log_every",
    "train.best_metric",
)


def check_followed(config: Config) -> None:
    """Raise `ConfigError` unless `train_pytorch` does all that `config` asks for."""
    flips_at_most = config.train.augment in ("none", "flip")
    asked = disagreement(
        to_dict(replace(Config(), data=replace(config.data, ignore_value=None))),
        to_dict(config),
        recorded="--against pytorch, which trains the reference design by its own protocol "
        "(BCE, Adam),",
        there="what was asked",
        ignore=[f for f in FOLLOWED if f != "train.augment" or flips_at_most],
    )
    if asked:
        raise ConfigError(f"{asked} Leave that out, or --against.")


def flips(seed: int, batch_size: int) -> Callable[[int], np.ndarray]:
    """For each step, which places of the global batch jaxunet flips: bool [batch_size]."""

    @jax.jit
    def drawn(step: jax.Array) -> jax.Array:
        keys = example_keys(seed_key(seed), step, jax.numpy.arange(batch_size))
        return jax.vmap(jax.random.bernoulli)(keys)

    return lambda step: np.asarray(drawn(jax.numpy.int32(step)))


def train_pytorch(
    config: Config,
    train_source: DataSource,
    validation_source: DataSource,
    *,
    progress: bool = True,
) -> Training:
    """Train the reference in PyTorch by its protocol: BCE, Adam, every image once an epoch.

    Raises:
        ConfigError: the configuration departs from it in more than what is `FOLLOWED`.
    """
    check_followed(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_pytorch_unet(config.model)
    order = BatchSampler(len(train_source), config.train.batch_size, config.train.seed)
    steps = order.batches_per_epoch * config.train.epochs
    recipe = make_recipe(config, steps)
    initial = jax.device_get(init_state(recipe).variables)
    weights = state_dict_from_variables(config.model, initial, "reference")
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    # torch's annotations have no overload of a memory format alone.
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rate = make_schedule(config.optimizer, steps)
    rates = np.array([float(rate(step)) for step in range(steps)])
    optimizer = torch.optim.Adam(model.parameters())
    flip = flips(config.train.seed, config.train.batch_size)
    train_split, validation_split = (
        {
            name: torch.from_numpy(array).to(device)
            for name, array in read_all(source, config.data, progress=False).items()
        }
        for source in (train_source, validation_source)
    )

    losses: list[float] = []
    epochs: list[dict[str, Any]] = []
    start = time.perf_counter()
    for epoch in range(config.train.epochs):
        examples = 0
        pending: list[tuple[torch.Tensor, int]] = []
        bar = range(order.batches_per_epoch)
        for _ in Bar(f"PyTorch epoch {epoch + 1}", len(bar), bar, show=progress):
            step = epoch * order.batches_per_epoch + len(pending)
            flipped = flip(step) if config.train.augment == "flip" else None
            images, masks = _batch(train_split, order.indices(step), flipped)
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(images), masks)
            loss.backward()
            optimizer.step()
            pending.append((loss.detach(), len(images)))
            examples += len(images)
        epoch_losses = [float(loss) for loss, _ in pending]
        losses += epoch_losses
        total = sum(
            loss * count for loss, (_, count) in zip(epoch_losses, pending, strict=True)
        )
        evaluated = _evaluate(model, validation_split, config)
        epochs.append({"train_loss": total / examples, **evaluated})
    seconds = time.perf_counter() - start
    count = len(train_source) * config.train.epochs
    return Training(losses, epochs, seconds, count / seconds)


def _batch(
    split: Split, indices: np.ndarray, flipped: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The real examples among `indices`, flipped and normalised: images and masks, NCHW."""
    real = indices != PADDING
    chosen = torch.from_numpy(indices[real]).to(split["image"].device)
    images, masks = (split[name][chosen] for name in ("image", "mask"))
    if flipped is not None:
        turned = torch.from_numpy(flipped[real]).to(images.device)[:, None, None, None]
        images = torch.where(turned, images.flip(2), images)
        masks = torch.where(turned, masks.flip(2), masks)
    # A permuted view of NHWC memory is PyTorch's channels_last.
    pixels, truth = images.permute(0, 3, 1, 2), masks.permute(0, 3, 1, 2)
    return (pixels.float() / 255 - 0.5) / 0.5, (truth > 0).float()


@torch.no_grad()
def _evaluate(model: torch.nn.Module, split: Split, config: Config) -> dict[str, Any]:
    order = BatchSampler(len(split["image"]), tuning.eval_batch_size(config.train))
    counts, losses = [], []
    for number in range(order.batches_per_epoch):
        images, masks = _batch(split, order.indices(number))
        found = counts_and_losses(model(images), masks > 0, config.train.threshold)
        counts.append(found[0].cpu().numpy())
        losses.append(found[1].cpu().numpy())
    return {
        "loss": float(np.concatenate(losses).astype(np.float64).mean()),
        "scores": scores(np.concatenate(counts)),
    }
