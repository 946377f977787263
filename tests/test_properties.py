"""What holds for all inputs, tried on inputs that Hypothesis makes up (the same every time)."""

import json
import math
from pathlib import Path
from random import Random
from typing import get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.config_json import from_dict, to_dict
from jaxunet.data.images import encode_png, read_image, resize_image, resize_mask
from jaxunet.data.masks import read_mask
from jaxunet.data.reader import BatchReader
from jaxunet.data.sampler import PADDING, BatchSampler
from jaxunet.errors import ConfigError
from jaxunet.learning.metrics import confusion_counts, per_image, scores
from jaxunet.provenance import disagreement

settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, max_examples=50
)
settings.load_profile("same")

sides = st.integers(1, 24)
pixels = st.integers(0, 2**20)
counts = arrays(np.int64, st.tuples(st.integers(1, 9), st.just(4)), elements=pixels).filter(
    lambda rows: rows.sum(axis=1).all()
)


@st.composite
def pictures(draw: st.DrawFn, channels: int) -> np.ndarray:
    values = st.integers(0, 255) if channels == 3 else st.sampled_from([0, 255])
    return draw(arrays(np.uint8, (draw(sides), draw(sides), channels), elements=values))


# Metrics.


@settings(max_examples=10)  # each new shape is compiled
@given(st.data(), st.sampled_from([(1, 1, 1, 1), (3, 5, 4, 1)]))
def test_the_four_counts_are_all_pixels_and_swap_with_the_masks(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    masks = arrays(np.bool_, shape)
    prediction, truth = data.draw(masks), data.draw(masks)
    found = np.asarray(confusion_counts(jnp.asarray(prediction), jnp.asarray(truth)))
    assert (found.sum(axis=1) == math.prod(shape[1:])).all()
    assert (found[:, [0, 2]].sum(axis=1) == truth.sum(axis=(1, 2, 3))).all()
    swapped = np.asarray(confusion_counts(jnp.asarray(truth), jnp.asarray(prediction)))
    np.testing.assert_array_equal(swapped, found[:, [0, 2, 1, 3]])


@given(counts)
def test_scores_lie_between_0_and_1_and_dice_determines_iou(rows: np.ndarray) -> None:
    found = per_image(rows)
    for values in found.values():
        assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(found["iou"], found["dice"] / (2 - found["dice"]), rtol=1e-12)
    assert (found["threshold_jaccard"] <= found["iou"]).all()


@given(counts)
def test_swapping_masks_or_classes_permutes_the_scores(
    rows: np.ndarray,
) -> None:
    found = per_image(rows)
    swapped, inverted = per_image(rows[:, [0, 2, 1, 3]]), per_image(rows[:, [3, 2, 1, 0]])
    for name in ("dice", "iou", "threshold_jaccard", "accuracy"):
        np.testing.assert_array_equal(swapped[name], found[name])
    np.testing.assert_array_equal(inverted["sensitivity"], found["specificity"])


@given(counts, st.randoms(use_true_random=False))
def test_the_order_of_images_matters_only_to_batches(rows: np.ndarray, random: Random) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    found, shuffled = scores(rows), scores(rows[order])
    assert shuffled["pooled"] == found["pooled"]
    for name, value in found["per_image"].items():
        assert math.isclose(shuffled["per_image"][name], value, rel_tol=1e-12)


# Batches and their padding.


@given(
    count=st.integers(1, 60),
    share=st.integers(1, 5),
    processes=st.integers(1, 4),
    seed=st.none() | st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_each_example_once_and_pads_to_whole_batches(
    count: int, share: int, processes: int, seed: int | None, epoch: int
) -> None:
    size = share * processes
    order = BatchSampler(count, size, seed)
    first = epoch * order.batches_per_epoch
    batches = [order.indices(first + n) for n in range(order.batches_per_epoch)]
    assert {len(batch) for batch in batches} == {size}
    together = np.concatenate(batches)
    assert sorted(together[together != PADDING]) == list(range(count))
    assert (together[count:] == PADDING).all()
    assert len(together) - count < size
    for n, batch in enumerate(batches):
        parts = [
            BatchSampler(count, size, seed, index, processes).local_indices(first + n)
            for index in range(processes)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), batch)


@given(count=st.integers(1, 9), size=st.integers(1, 9), side=st.integers(1, 8))
def test_weights_tell_examples_from_padding(count: int, size: int, side: int) -> None:
    source = [
        {
            "image": np.full((side, side, 3), number + 1, np.uint8),
            "mask": np.full((side, side, 1), 255, np.uint8),
        }
        for number in range(count)
    ]
    order = BatchSampler(count, size, seed=0)
    reader = BatchReader(source, order, side)
    batches = [reader(n) for n in range(order.batches_per_epoch)]
    assert sum(int(batch["weight"].sum()) for batch in batches) == count
    for n, batch in enumerate(batches):
        expected = np.where(order.indices(n) == PADDING, 0, order.indices(n) + 1)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], expected)
        np.testing.assert_array_equal(batch["mask"][:, 0, 0, 0], 255 * batch["weight"])


# Pictures.


@given(pictures(3), pictures(1))
def test_png_and_resizing_to_the_same_size_change_nothing(
    image: np.ndarray, mask: np.ndarray
) -> None:
    np.testing.assert_array_equal(read_image(encode_png(image)), image)
    np.testing.assert_array_equal(read_mask(encode_png(mask)), mask)
    np.testing.assert_array_equal(resize_image(image, *image.shape[:2]), image)
    np.testing.assert_array_equal(resize_mask(mask, *mask.shape[:2]), mask)


@given(pictures(1), st.integers(1, 4), st.integers(1, 4))
def test_a_mask_enlarged_by_whole_numbers_comes_back(
    mask: np.ndarray, rows: int, columns: int
) -> None:
    height, width, _ = mask.shape
    enlarged = resize_mask(mask, rows * height, columns * width)
    np.testing.assert_array_equal(enlarged, mask.repeat(rows, axis=0).repeat(columns, axis=1))
    np.testing.assert_array_equal(resize_mask(enlarged, height, width), mask)


@given(pictures(3), sides, sides)
def test_a_resized_image_stays_within_its_range_and_keeps_one_colour(
    image: np.ndarray, height: int, width: int
) -> None:
    resized = resize_image(image, height, width)
    assert resized.shape == (height, width, 3)
    assert (resized.min(axis=(0, 1)) >= image.min(axis=(0, 1))).all()
    assert (resized.max(axis=(0, 1)) <= image.max(axis=(0, 1))).all()
    flat = np.broadcast_to(image[:1, :1], image.shape).copy()
    assert (resize_image(flat, height, width) == image[0, 0]).all()


# Configurations.


def one_of(kind: type, field: str) -> st.SearchStrategy:
    return st.sampled_from(get_args(get_type_hints(kind)[field]))


configs = st.builds(
    Config,
    data=st.builds(
        DataConfig,
        dir=st.none() | st.text("aé 1/", min_size=1).map(Path),
        image_size=st.integers(64, 1024),
        stored_size=st.sampled_from(["native", "auto", 1, 300]),
        binarize=st.booleans(),
    ),
    model=st.builds(
        ModelConfig,
        width=st.sampled_from([2, 4, 8, 16]),
        depth=st.integers(2, 7),
        norm=one_of(ModelConfig, "norm"),
        upsampling=one_of(ModelConfig, "upsampling"),
    ),
    optimizer=st.builds(
        OptimizerConfig,
        learning_rate=st.floats(0, 1e300, exclude_min=True),
        clip_norm=st.none() | st.floats(1e-300, 1e300),
    ),
    train=st.builds(
        TrainConfig,
        epochs=st.integers(1, 2**40),
        seed=st.integers(0, 2**63 - 1),
        threshold=st.floats(0, 1, exclude_min=True, exclude_max=True),
        loss=one_of(TrainConfig, "loss"),
    ),
)


@given(configs, configs)
def test_a_configuration_survives_json_and_differences_tell_two_apart(
    config: Config, other: Config
) -> None:
    back = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert back == config
    sides = {"recorded": "one", "there": "the other"}
    assert disagreement(to_dict(config), to_dict(back), **sides) is None
    differ = disagreement(to_dict(config), to_dict(other), **sides)
    assert (differ is not None) == (config != other)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.data(), json_values)
def test_any_json_value_in_any_field_is_taken_or_refused_by_name(
    data: st.DataObject, value: object
) -> None:
    record = json.loads(json.dumps(to_dict(Config())))
    section = data.draw(st.sampled_from(sorted(record)))
    field = data.draw(st.sampled_from(sorted(record[section])))
    record[section][field] = value
    try:
        from_dict(Config, record)
    except ConfigError as error:
        assert f"{section}.{field}" in str(error) or "data.image_size" in str(error)  # noqa: PT017
