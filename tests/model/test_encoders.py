"""Encoders beside timm's: maps, gradients, batch norm's statistics, and real weights."""

from functools import partial

import any_torchvision  # noqa: F401  before timm, which asks for it
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from flax import traverse_util

from jaxunet.config import ModelConfig
from jaxunet.data.drawing import draw
from jaxunet.learning.augment import normalize
from jaxunet.model.encoders import efficientnet_lite, resnet
from jaxunet.model.encoders.registry import ENCODERS
from jaxunet.model_config import EncoderName
from jaxunet.pretrained.names import layers_of
from jaxunet.pretrained.renaming import encoder_variables, names_of
from jaxunet.pretrained.sources import SOURCES
from jaxunet.pretrained.starting import starting_weights

TIMM: dict[EncoderName, str] = {
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite1": "tf_efficientnet_lite1",
    "efficientnet_lite2": "tf_efficientnet_lite2",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
}
NAMES = list(TIMM)


def timms(encoder: EncoderName, seed: int = 0) -> torch.nn.Module:
    """timm's, with running statistics that differ from channel to channel."""
    torch.manual_seed(seed)
    model = timm.create_model(TIMM[encoder], features_only=True)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.7, 1.3)
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def ours(encoder: EncoderName, train: bool):
    return ENCODERS[encoder].make(ModelConfig(encoder=encoder), None, train)


def images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def assert_close(found, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    found, expected = np.asarray(found), expected.detach().numpy()
    if found.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    assert found.shape == expected.shape, what
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    assert worst < tolerance, f"{what}: {worst}"


@pytest.mark.parametrize(
    ("encoder", "sides"),
    [
        *((encoder, (75, 46)) for encoder in NAMES),
        *((encoder, (224, 224)) for encoder in ("efficientnet_lite0", "resnet18")),
    ],
)
def test_maps_are_timms(encoder: EncoderName, sides: tuple[int, int]) -> None:
    model = timms(encoder).eval()
    variables = encoder_variables(encoder, tensors_of(model), "timm")
    x = images(1, 1, *sides)
    none, *maps = jax.jit(ours(encoder, False).apply)(variables, x, jnp.ones(1, bool))
    assert none is None
    with torch.no_grad():
        compare_maps(maps, model(to_torch(x)))


@pytest.mark.parametrize(
    ("encoder", "train"),
    [
        ("efficientnet_lite0", False),
        ("efficientnet_lite0", True),
        ("resnet18", True),
        ("resnet50", True),
    ],
)
def test_gradients_and_statistics_are_timms(
    encoder: EncoderName, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a smooth function in place of ReLU: where the sign of one number close to 0 differs
    # by rounding, a gradient through so many norms of small batches differs by percents, in
    # float32 and float64 of PyTorch alike.
    monkeypatch.setattr(efficientnet_lite, "relu6", jnp.tanh)
    monkeypatch.setattr(resnet, "relu", jnp.tanh)
    compare(encoder, train=train, x=images(2, 4, 64, 64) if train else images(2, 1, 75, 46))


def smooth(model: torch.nn.Module) -> None:
    for name, module in model.named_children():
        if isinstance(module, torch.nn.ReLU | torch.nn.ReLU6):
            setattr(model, name, torch.nn.Tanh())
        smooth(module)


def compare_maps(
    found: list[jax.Array], expected: list[torch.Tensor], tolerance: float = 1e-4
) -> None:
    assert len(found) == len(expected) == 5
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close(a, b, tolerance, f"map {number}")


def compare(encoder: EncoderName, *, train: bool, x: np.ndarray) -> None:
    """Maps, and gradients of a random sum of them; in training the running statistics too."""
    model = timms(encoder).train(train)
    smooth(model)
    variables = encoder_variables(encoder, tensors_of(model), "timm")
    tensor = to_torch(x).requires_grad_()
    expected = model(tensor)
    rng = np.random.default_rng(3)
    shapes = [m.detach().permute(0, 2, 3, 1).shape for m in expected]
    cotangents = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    torch.autograd.backward(expected, [to_torch(c) for c in cotangents])

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(params, x):
        (_, *maps), changed = ours(encoder, train).apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            *(x, jnp.ones(len(x), bool)),
            mutable=["batch_stats"],
        )
        total = sum(jnp.vdot(m, c) for m, c in zip(maps, cotangents, strict=True))
        return total, (maps, changed["batch_stats"])

    (grads, dx), (maps, statistics) = gradients(variables["params"], x)
    # Through so many norms of small batches PyTorch's own float32 lies 4e-4 off its float64.
    compare_maps(maps, expected, 1e-3 if train else 1e-4)
    assert_close(dx, tensor.grad, 1e-3, "images")
    after = tensors_of(model)
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    expected_grads = encoder_variables(encoder, {**after, **theirs}, "timm")["params"]
    flat = traverse_util.flatten_dict(expected_grads)
    # Some are 0 but for rounding: of a bias that the next norm takes off again.
    least = 1e-3 * max(np.abs(value).max() for value in flat.values())
    for path, value in traverse_util.flatten_dict(grads).items():
        worst = np.abs(value - flat[path]).max() / max(np.abs(flat[path]).max(), least)
        assert worst < 1e-3, (path, worst)
    names = names_of(encoder, "timm")
    for path, value in traverse_util.flatten_dict(statistics).items():
        np.testing.assert_allclose(value, after[names["batch_stats", *path]], 1e-4, 1e-5)


def test_every_layout_names_every_variable() -> None:
    for encoder in NAMES:
        for layout in layers_of(encoder)[0].names:
            names = names_of(encoder, layout)
            assert len(set(names.values())) == len(names)


def pictures() -> np.ndarray:
    """Four pictures of 224 px: noise, and lesions as the synthetic data set draws them."""
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    return np.stack([noise, *(draw(0, "train", index, 224)[0] for index in range(3))])


def test_real_weights_see_the_same_classes_as_in_timm() -> None:
    encoder: EncoderName = "efficientnet_lite0"
    weights = starting_weights(ModelConfig(encoder=encoder, weights="imagenet"))
    assert weights is not None
    x = np.asarray(normalize(jnp.asarray(pictures()), encoder))
    last = jax.jit(ours(encoder, False).apply)(weights.variables, x, jnp.ones(len(x), bool))[-1]

    path, _ = SOURCES[encoder].find()
    theirs = torch.load(path, weights_only=True)
    to_timm = dict(
        zip(
            names_of(encoder, "package").values(),
            names_of(encoder, "timm").values(),
            strict=True,
        )
    )
    for old, new in (("_conv_head", "conv_head"), ("_bn1", "bn2"), ("_fc", "classifier")):
        to_timm |= {k: k.replace(old, new) for k in theirs if k.startswith(f"{old}.")}
    model = timm.create_model(TIMM[encoder]).eval()
    model.load_state_dict({to_timm[k]: v for k, v in theirs.items() if k in to_timm})
    with torch.no_grad():
        expected = model(to_torch(x)).softmax(1)
        head = model.forward_head(model.bn2(model.conv_head(to_torch(np.asarray(last)))))
    found, expected = head.softmax(1).numpy(), expected.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for ours_, theirs_ in zip(found, expected, strict=True):
        assert list(np.argsort(-ours_)[:5]) == list(np.argsort(-theirs_)[:5])
    assert expected.max(axis=1).min() > 0.05  # of 1,000 classes: they do see something
