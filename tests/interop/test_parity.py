"""The same weights give the same logits, gradients and training as in PyTorch.

float32 on the CPU, both frameworks in one process.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import linen as nn
from pytorch_designs import MilesialUNet, ReferenceUNet, arrays, enliven

from jaxunet.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.devices.strategies import make_strategy
from jaxunet.interop.pytorch import state_dict_from_variables, variables_from_state_dict
from jaxunet.learning.losses import LOSSES, lesion_logits
from jaxunet.learning.steps import make_recipe, state_from_variables, train_step
from jaxunet.model.decoder import DecoderLevel
from jaxunet.model.unet import make_unet


def pictures(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype("f4")


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def from_torch(logits: torch.Tensor) -> np.ndarray:
    return logits.detach().permute(0, 2, 3, 1).numpy()


def theirs(model: torch.nn.Module, images: np.ndarray, **options) -> np.ndarray:
    with torch.no_grad():
        return from_torch(model(to_torch(images), **options))


def ours(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    config, _, variables = variables_from_state_dict(arrays(model))
    return np.asarray(jax.jit(make_unet(config).apply)(variables, images))


def assert_same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    # Had the logits no spread, the biases alone would make them agree.
    assert expected.std() > 0.02 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("width", "batch", "height", "columns"),
    [
        (16, 4, 128, 128),
        (8, 1, 572, 572),
        (8, 3, 113, 95),
        (64, 1, 256, 256),
    ],
)
def test_reference_logits_are_pytorchs(width, batch, height, columns):
    model = enliven(ReferenceUNet(width))
    images = pictures(batch, height, columns)
    expected = theirs(model, images)
    assert expected.shape == (batch, height // 16 * 16, columns // 16 * 16, 1)
    assert_same_logits(ours(model, images), expected)


@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
@pytest.mark.parametrize(
    ("width", "batch", "height", "columns", "num_logits"),
    [(16, 4, 128, 128, 2), (8, 3, 113, 95, 1)],
)
def test_milesials_logits_are_pytorchs(bilinear, width, batch, height, columns, num_logits):
    model = enliven(MilesialUNet(width, num_logits=num_logits, bilinear=bilinear))
    images = pictures(batch, height, columns)
    expected = theirs(model, images)
    assert expected.shape == (batch, height, columns, num_logits)
    assert_same_logits(ours(model, images), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReferenceUNet(8),
        lambda: MilesialUNet(8),
        lambda: MilesialUNet(8, bilinear=True),
    ],
    ids=["reference", "milesial", "milesial bilinear"],
)
def test_each_skip_connection_changes_the_output_as_it_does_in_pytorch(make):
    model = enliven(make())
    images = pictures(1, 50, 43)
    config, _, variables = variables_from_state_dict(arrays(model))
    levels = config.depth - 1

    @jax.jit
    def apply(variables, images, kept):
        def scale_skip(call, args, kwargs, context):
            module = context.module
            if isinstance(module, DecoderLevel) and context.method_name == "__call__":
                x, skip, weight = args
                args = (x, skip * kept[int(module.name.removeprefix("level_"))], weight)
            return call(*args, **kwargs)

        with nn.intercept_methods(scale_skip):
            return make_unet(config).apply(variables, images)

    whole = np.asarray(apply(variables, images, np.ones(levels, np.float32)))
    assert_same_logits(whole, theirs(model, images))
    for level in range(levels):
        kept = np.where(np.arange(levels) == level, 0, 1).astype(np.float32)
        found = np.asarray(apply(variables, images, kept))
        assert np.abs(found - whole).max() > 0.01 * np.abs(whole).max(), f"skip {level}"
        assert_same_logits(found, theirs(model, images, without_skip=level))


def smp_loss(name: str, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One image's loss as segmentation_models_pytorch defines it in mode "binary".

    With its options set to jaxunet's choices: smooth=1 (tversky, jaccard and dice), alpha 0.3
    and beta 0.7 (tversky), gamma 2 and no alpha (focal), per_image=True (lovasz).
    """
    score, target = logits.flatten(), mask.flatten()
    probability = F.logsigmoid(score).exp()
    intersection = (probability * target).sum()
    cardinality = (probability + target).sum()
    if name == "bce":
        return F.binary_cross_entropy_with_logits(score, target)
    if name == "dice":
        return 1 - (2 * intersection + 1) / (cardinality + 1)
    if name == "bce_dice":
        return smp_loss("bce", logits, mask) + smp_loss("dice", logits, mask)
    if name == "jaccard":
        return 1 - (intersection + 1) / (cardinality - intersection + 1)
    if name == "tversky":
        false_positive = (probability * (1 - target)).sum()
        false_negative = ((1 - probability) * target).sum()
        below = intersection + 0.3 * false_positive + 0.7 * false_negative + 1
        return 1 - (intersection + 1) / below
    if name == "focal":
        log_likelihood = F.binary_cross_entropy_with_logits(score, target, reduction="none")
        return ((1 - torch.exp(-log_likelihood)) ** 2 * log_likelihood).mean()
    assert name == "lovasz"
    errors, order = torch.sort(1 - score * (2 * target - 1), descending=True)
    truth = target[order]
    union = truth.sum() + (1 - truth).cumsum(0)
    jaccard = 1 - (truth.sum() - truth.cumsum(0)) / union
    gradient = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    return torch.dot(F.relu(errors), gradient)


def blobs(batch: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 pictures with a bright disc each, and the discs as 0/255 masks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    centers = rng.uniform(0.3 * side, 0.7 * side, (batch, 2, 1, 1))
    radius = rng.uniform(0.15 * side, 0.3 * side, (batch, 1, 1))
    disc = (y - centers[:, 0]) ** 2 + (x - centers[:, 1]) ** 2 < radius**2
    noise = rng.integers(0, 120, (batch, side, side, 3))
    images = (noise + 100 * disc[..., None]).astype(np.uint8)
    return images, (255 * disc[..., None]).astype(np.uint8)


@pytest.mark.parametrize(
    "make",
    [lambda: ReferenceUNet(8), lambda: MilesialUNet(8, 4, bilinear=True).train()],
    ids=["reference", "milesial"],
)
def test_gradients_of_every_parameter_are_pytorchs_for_every_loss(make):
    model = make()
    training = model.training and isinstance(model, MilesialUNet)
    # With seed 0 a unit of milesial's lies so near ReLU's kink that float32 cannot tell on
    # which side, and its gradient with it.
    enliven(model, seed=1).train(training)
    config, layout, variables = variables_from_state_dict(arrays(model))
    raw, masks = blobs(2, 64, seed=1)
    images = (raw / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    truth = (masks > 0).astype(np.float32)

    def apply(params):
        logits, _ = make_unet(config).apply(
            {**variables, "params": params},
            jnp.asarray(images),
            train=training,
            mutable=["batch_stats"],
        )
        return lesion_logits(logits)

    # The chain rule by hand, so that the model is compiled once for all losses.
    our_logits = jax.jit(apply)(variables["params"])
    pull_back = jax.jit(lambda params, gradient: jax.vjp(apply, params)[1](gradient)[0])

    logits = model(to_torch(images))
    if config.num_logits == 2:
        logits = logits[:, 1:] - logits[:, :1]
    for name, loss in LOSSES.items():
        value, gradient = jax.value_and_grad(
            lambda logits, loss=loss: loss(logits, jnp.asarray(truth)).mean()
        )(our_logits)
        gradients = pull_back(variables["params"], gradient)
        found = state_dict_from_variables(config, {**variables, "params": gradients}, layout)

        pairs = zip(logits, to_torch(truth), strict=True)
        expected = torch.stack([smp_loss(name, *pair) for pair in pairs]).mean()
        model.zero_grad()
        expected.backward(retain_graph=True)
        assert float(value) == pytest.approx(expected.item(), rel=1e-5), name
        for key, parameter in model.named_parameters():
            size = np.linalg.norm(parameter.grad.numpy())
            assert size > 0, (name, key)
            error = np.linalg.norm(found[key] - parameter.grad.numpy())
            assert error <= 1e-3 * size, (name, key)


STEPS = 50
OPTIMIZERS = {
    "adam": (
        OptimizerConfig(name="adam", learning_rate=1e-3),
        lambda p: torch.optim.Adam(p, 1e-3),
    ),
    "adamw": (
        OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    ),
    "sgd": (
        OptimizerConfig(name="sgd", learning_rate=0.05, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    ),
}


def pytorch_curve(model, make_optimizer, batches) -> np.ndarray:
    """The losses of a plain PyTorch training loop, as the reference has it."""
    optimizer = make_optimizer(model.parameters())
    curve = []
    for images, masks in batches:
        x = (to_torch(images) / 255 - 0.5) / 0.5
        loss = F.binary_cross_entropy_with_logits(model(x), (to_torch(masks) > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return np.array(curve)


def jaxunet_curve(config: Config, variables, batches) -> tuple[np.ndarray, dict]:
    """The losses of jaxunet's own train step, and the variables after it."""
    recipe = make_recipe(config, STEPS)
    strategy = make_strategy("jit", jax.devices()[:1])
    step = strategy.compile(
        lambda state, batch: train_step(recipe, state, batch), outputs="replicated"
    )
    state = strategy.replicate(state_from_variables(recipe, variables))
    curve = []
    for images, masks in batches:
        batch = {"image": images, "mask": masks, "weight": np.ones(len(images), np.uint8)}
        state, metrics = step(state, strategy.split(batch))
        curve.append(float(metrics["loss"]))
    return np.array(curve), strategy.fetch(state).variables


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_of_training_have_pytorchs_loss_curve(name):
    optimizer, make_optimizer = OPTIMIZERS[name]
    torch.manual_seed(3)
    model = ReferenceUNet(8, depth=4)
    if name == "sgd":  # from PyTorch's own weights it stands still for long
        enliven(model)
    model.train()
    model_config, _, variables = variables_from_state_dict(arrays(model))
    batches = [blobs(4, 32, seed) for seed in range(STEPS)]
    config = Config(
        model=model_config,
        optimizer=optimizer,
        train=TrainConfig(augment="none", batch_size=4),
    )
    expected = pytorch_curve(model, make_optimizer, batches)
    found, _ = jaxunet_curve(config, variables, batches)
    assert expected[-5:].mean() < 0.8 * expected[:5].mean()  # it did train
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_milesials_batch_norm_trains_and_keeps_its_statistics_as_in_pytorch():
    optimizer, make_optimizer = OPTIMIZERS["sgd"]
    model = enliven(MilesialUNet(8, depth=3, num_logits=1)).train()
    model_config, layout, variables = variables_from_state_dict(arrays(model))
    batches = [blobs(4, 32, seed) for seed in range(10)]
    config = Config(
        model=model_config,
        optimizer=optimizer,
        train=TrainConfig(augment="none", batch_size=4),
    )
    expected = pytorch_curve(model, make_optimizer, batches)
    found, after = jaxunet_curve(config, variables, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    state = state_dict_from_variables(
        model_config, after, layout, counted={}, steps=17 + len(batches)
    )
    for key, tensor in arrays(model).items():
        if "running" in key:
            np.testing.assert_allclose(state[key], tensor, rtol=1e-3, atol=1e-3, err_msg=key)
        elif "tracked" in key:
            assert state[key] == tensor, key


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (ModelConfig(width=8, depth=3), lambda: ReferenceUNet(8, 3)),
        (
            ModelConfig(
                width=8,
                depth=3,
                norm="batch",
                skip="pad",
                concat="skip_first",
                conv_bias=False,
                num_logits=2,
            ),
            lambda: MilesialUNet(8, 3),
        ),
    ],
    ids=["reference", "milesial"],
)
def test_initial_weights_are_distributed_as_pytorchs_defaults(config, make):
    """Layer by layer, over many seeds: bounds, mean and variance of uniform numbers."""
    seeds = 64
    model = make_unet(config)
    images = jnp.zeros((1, 8, 8, 3))
    init = jax.jit(lambda key: model.init(key, images))
    layout = "reference" if config.norm == "none" else "milesial"
    ours_, theirs_ = [], []
    for seed in range(seeds):
        variables = jax.tree.map(np.asarray, init(jax.random.key(seed, impl="rbg")))
        ours_.append(state_dict_from_variables(config, variables, layout))
        torch.manual_seed(seed)
        theirs_.append(arrays(make()))
    for key in theirs_[0]:
        found = np.stack([state[key] for state in ours_]).astype(np.float64)
        expected = np.stack([state[key] for state in theirs_]).astype(np.float64)
        if np.ptp(expected) == 0:  # batch norm begins with constants
            np.testing.assert_array_equal(found, expected, err_msg=key)
            continue
        count, bound = found.size, np.abs(expected).max()
        # The largest of n uniform numbers falls short of the bound by more than 15/n once in
        # three million times; mean and variance lie within 5 standard errors of each other.
        assert abs(np.abs(found).max() / bound - 1) < 15 / count, key
        assert abs(found.mean()) < 5 * bound / np.sqrt(3 * count), key
        error = 5 * np.sqrt(2 * 0.8 / count)
        assert abs(found.var() / expected.var() - 1) < error, key
        assert abs(found.var() / (bound**2 / 3) - 1) < error, key
        drawn_apart = np.unique(found.reshape(seeds, -1)[:, 0]).size
        assert drawn_apart == seeds, key


def test_a_gradient_norm_that_is_reported_is_pytorchs():
    model = enliven(ReferenceUNet(8, depth=3))
    config, _, variables = variables_from_state_dict(arrays(model))
    images, masks = blobs(4, 32, seed=5)
    recipe = make_recipe(Config(model=config, train=TrainConfig(augment="none")), 1)
    strategy = make_strategy("jit", jax.devices()[:1])
    step = strategy.compile(lambda s, b: train_step(recipe, s, b), outputs="replicated")
    state = strategy.replicate(state_from_variables(recipe, variables))
    batch = {"image": images, "mask": masks, "weight": np.ones(4, np.uint8)}
    _, metrics = step(state, strategy.split(batch))
    x = (to_torch(images) / 255 - 0.5) / 0.5
    F.binary_cross_entropy_with_logits(model(x), (to_torch(masks) > 0).float()).backward()
    expected = float(optax.tree.norm([p.grad.numpy() for p in model.parameters()]))
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-4)
