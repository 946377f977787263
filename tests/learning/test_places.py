"""Where pixels, examples and averages come to lie: both axes, many parts, ties."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data.sampler import BatchSampler
from jaxunet.devices.feed import Feed
from jaxunet.devices.strategies import check_divisible, make_strategy
from jaxunet.errors import ConfigError, DataError
from jaxunet.inference.pictures import plan
from jaxunet.learning.clean_up import clean_up
from jaxunet.learning.steps import init_state, make_recipe, train_step
from jaxunet.model.resizing import center_crop, center_pad


def test_cropping_and_padding_put_the_odd_column_on_the_far_side_too():
    x = jnp.arange(3.0 * 6).reshape(1, 3, 6, 1)
    assert center_crop(x, 2, 3)[0, :, :, 0].tolist() == [[1, 2, 3], [7, 8, 9]]
    found = center_pad(1 + x[:, :1, :2], 4, 5)[0, :, :, 0]
    assert found.tolist() == [[0] * 5, [0, 1, 2, 0, 0], [0] * 5, [0] * 5]


def test_of_components_of_one_size_the_first_in_reading_order_stays():
    mask = np.zeros((5, 9), np.uint8)
    for row, column in ((2, 7), (1, 4), (1, 0)):
        mask[row : row + 2, column : column + 2] = 255
    expected = np.zeros_like(mask)
    expected[1:3, 0:2] = 255
    np.testing.assert_array_equal(clean_up(mask), expected)


def test_an_overlay_never_replaces_an_input(tmp_path):
    for name in ("a.png", "a_overlay.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    inputs = [tmp_path / "a.png", tmp_path / "a_overlay.png"]
    with pytest.raises(DataError, match=r"a_overlay\.png"):
        plan(inputs, tmp_path, suffixes=("_segmentation", "_overlay"))


class Numbered:
    """Forty examples, more than are read at once, that hold their own number."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {
            "image": np.full((2, 2, 3), index, np.uint8),
            "mask": np.full((2, 2, 1), 255 * (index % 3 == 0), np.uint8),
        }


def test_a_cache_on_the_devices_holds_a_split_of_several_parts_in_order():
    strategy = make_strategy("jit", jax.devices()[:2])
    feed = Feed(strategy, Numbered(), DataConfig(image_size=2, cache="device"), progress=False)
    compiled = feed.compile(
        lambda _, batch: jax.lax.all_gather(batch, "data", tiled=True), outputs="replicated"
    )
    order = BatchSampler(40, 6)
    seen = []
    for batch in feed.batches(order, order.batches_per_epoch):
        found = strategy.fetch(compiled(strategy.replicate(np.float32(0)), feed.place(batch)))
        real = found["weight"] > 0
        seen += found["image"][real, 0, 0, 0].tolist()
        expected = (
            np.where(found["image"][..., :1] % 3 == 0, 255, 0) * real[:, None, None, None]
        )
        np.testing.assert_array_equal(found["mask"], expected)
    assert seen == list(range(40))


def test_a_batch_smaller_than_the_devices_is_refused_with_the_one_size_that_fits():
    with pytest.raises(ConfigError, match=r"is 3, which the 8 devices .* use 8, or fewer"):
        check_divisible("train.batch_size", 3, 8)


def test_the_average_is_of_the_weights_that_a_step_leaves():
    config = Config(
        data=DataConfig(image_size=8),
        model=ModelConfig(width=2, depth=2, init="he"),
        # So small a decay is below that of any warm-up.
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, ema_decay=0.1),
        train=TrainConfig(augment="none"),
    )
    recipe = make_recipe(config, 2)
    strategy = make_strategy("jit", jax.devices()[:1])
    step = strategy.compile(partial(train_step, recipe), outputs="replicated")
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 8, 8, 3), np.uint8),
        "mask": rng.choice([0, 255], (4, 8, 8, 1)).astype(np.uint8),
        "weight": np.ones(4, np.uint8),
    }
    state = strategy.replicate(init_state(recipe))
    host = strategy.fetch(state)
    average = host.params
    for _ in range(2):
        before = host
        state, _ = step(state, strategy.split(batch))
        host = strategy.fetch(state)
        average = jax.tree.map(lambda a, p: 0.1 * a + 0.9 * p, average, host.params)
        for found, expected, old in zip(
            *map(jax.tree.leaves, (host.variables["params"], average, before.params)),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            assert np.abs(found - old).max() > 1e-5  # it moved, so that the two differ
