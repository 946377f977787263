"""Training with a pretrained encoder: its rate, its freezing, devices, sizes, what it sees."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_encoder import TINY, tiny_encoder

from jaxunet.config import Config, ModelConfig, OptimizerConfig
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import ConfigError
from jaxunet.interop.layouts import layout_of
from jaxunet.learning.augment import normalize
from jaxunet.learning.optim import make_optimizer
from jaxunet.learning.steps import init_state, make_recipe, predict_step, train_step
from jaxunet.model.encoders.registry import ENCODERS
from jaxunet.runs.journal import Position


@pytest.fixture(scope="module")
def tiny():
    with tiny_encoder():
        yield


def batches(count: int, side: int = 20) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (8, side, side, 3), np.uint8),
            "mask": rng.integers(0, 2, (8, side, side, 1), np.uint8) * 255,
            "weight": np.array([1] * 7 + [i == 0], np.uint8),
        }
        for i in range(count)
    ]


@cache
def trained(devices: int):
    config = Config(model=TINY, optimizer=OptimizerConfig(name="sgd", learning_rate=0.01))
    recipe = make_recipe(config)
    strategy = make_strategy("jit", jax.devices()[:devices])
    step = strategy.compile(partial(train_step, recipe), outputs="replicated")
    start = jax.tree.map(np.asarray, init_state(recipe))
    state, losses = strategy.replicate(start), []
    for batch in batches(2):
        state, metrics = step(state, strategy.split(batch))
        losses.append(float(strategy.fetch(metrics)["loss"]))
    return start, strategy.fetch(state), losses


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_so_many_devices_compute_the_same(tiny, devices: int) -> None:
    (before, one, losses), (_, several, others) = trained(1), trained(devices)
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.batch_stats, one.batch_stats)
    assert min(jax.tree.leaves(moved["encoder"])) > 0


def test_frozen_statistics_are_those_that_came(tiny) -> None:
    """The network sees the same in training as after it, and leaves them as they are."""
    frozen = replace(TINY, encoder_statistics="frozen", weights="imagenet")
    makes = [ENCODERS[TINY.encoder].make(frozen, None, train) for train in (True, False)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    weight = jnp.ones(2, bool)
    variables = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.3),
        jax.eval_shape(makes[0].init, jax.random.key(0), x, weight),
    )
    maps, changed = makes[0].apply(variables, x, weight, mutable=["batch_stats"])
    np.testing.assert_array_equal(maps[-1], makes[1].apply(variables, x, weight)[-1])
    for leaf in jax.tree.leaves(changed):
        assert (leaf == jnp.float32(0.3)).all()


@pytest.mark.parametrize("sides", [(33, 50), (1, 7)])
def test_any_size_goes_in_and_the_same_comes_out(tiny, sides: tuple[int, int]) -> None:
    recipe = make_recipe(Config(model=TINY))
    variables = jax.eval_shape(partial(init_state, recipe)).variables
    images = jax.ShapeDtypeStruct((1, *sides, 3), jnp.uint8)
    found = jax.eval_shape(partial(predict_step, recipe), variables, images)
    assert found.shape == (1, *sides, 1)


def test_group_norm_goes_by_the_decoders_width(tiny) -> None:
    odd = replace(TINY, norm="group", decoder_width=16, width=11, upsampling="bilinear")
    recipe = make_recipe(Config(model=odd))
    assert jax.eval_shape(partial(init_state, recipe)).params["decoder"]
    with pytest.raises(
        ConfigError, match=r"model\.decoder_width is 12, but must be a multiple"
    ):
        replace(odd, decoder_width=12)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_encoders_rate_is_a_rate_of_its_own(name: str) -> None:
    """As two optimizers, one with a tenth of the rate."""

    def walk(config: OptimizerConfig, part: str, freeze: int = 0) -> list[np.ndarray]:
        optimizer = make_optimizer(config, None, freeze)
        params = {"encoder": jnp.ones(3), "decoder": jnp.ones(3)}
        state, path = optimizer.init(params), []
        for i in range(6):
            grads = jax.tree.map(lambda p, i=i: jnp.cos(p * (i + 1)), params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            path.append(np.asarray(params[part]))
        return path

    rate = OptimizerConfig(name=name, learning_rate=0.1, encoder_rate=0.1)
    slow = OptimizerConfig(name=name, learning_rate=0.01)
    fast = OptimizerConfig(name=name, learning_rate=0.1)
    np.testing.assert_allclose(walk(rate, "encoder"), walk(slow, "encoder"), rtol=1e-5)
    np.testing.assert_array_equal(walk(rate, "decoder"), walk(fast, "decoder"))
    frozen = walk(replace(rate, freeze_epochs=1), "encoder", freeze=4)
    assert [bool((w == 1).all()) for w in frozen] == [True] * 4 + [False] * 2


def test_freezing_ends_with_its_epoch_when_others_have_another_length() -> None:
    """Two epochs of 10 steps, then data of 1,000 steps an epoch."""
    config = Config(model=TINY, optimizer=OptimizerConfig(freeze_epochs=2))
    position = Position(batches_per_epoch=1000, shift=1980)
    lengths = [position.steps_until(epochs) for epochs in (5, 2)]
    optimizer = make_recipe(config, *lengths).optimizer
    params = {"encoder": jnp.ones(1), "decoder": jnp.ones(1)}
    state = optimizer.init(params)
    moved = []
    for _ in range(22):
        updates, state = optimizer.update(params, state, params)
        moved.append(bool(updates["encoder"][0]))
    assert moved == [False] * 20 + [True] * 2


def test_images_are_normalised_as_each_encoder_was_trained() -> None:
    x = jnp.asarray([[[[0, 127, 255]]]], jnp.uint8)

    def seen(encoder) -> np.ndarray:
        return np.asarray(normalize(x, encoder))[0, 0, 0]

    np.testing.assert_allclose(seen("plain"), [-1, -1 / 255, 1], rtol=1e-4)
    np.testing.assert_allclose(seen("efficientnet_lite1"), [-127 / 128, 0, 1], atol=1e-6)
    expected = [-0.485 / 0.229, (127 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(seen("resnet34"), expected, rtol=1e-4)


def test_export_to_pytorch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"reference needs model\.encoder 'plain' \(it is 'res"
    ):
        layout_of(ModelConfig(encoder="resnet18"))
