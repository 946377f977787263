"""Pictures varied inside the step, against SciPy, Pillow and the standard library."""

import colorsys
from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from jaxunet.augmentation_config import STRENGTHS, AugmentationConfig, Ranges
from jaxunet.config import Config, ModelConfig, TrainConfig
from jaxunet.config_json import from_dict, to_dict
from jaxunet.devices.strategies import make_strategy
from jaxunet.errors import ConfigError
from jaxunet.learning.augment import augment, example_keys, seed_key
from jaxunet.learning.coloring import add_noise, blur, cut_out, recolor
from jaxunet.learning.steps import make_recipe, varied
from jaxunet.learning.warping import maps, warp

SIDE = 12
# On pictures this small, too, a blur shall be one.
EVERYTHING = AugmentationConfig(blur=0.1)
CONFIG = Config(
    model=ModelConfig(width=2, depth=2),
    train=TrainConfig(augment="strong", augmentation=EVERYTHING),
)


def pictures(count, height=SIDE, width=SIDE):
    """Smooth colours with a little of every value, and masks of what is light in red."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(count, height, width, 3)), (0, 1, 1, 0))
    images = ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)
    return images, np.where(images[..., :1] > 128, 255, 0).astype(np.uint8)


def batch_of(count, real=None):
    images, masks = pictures(count)
    weight = (np.arange(count) < (count if real is None else real)).astype(np.uint8)
    return {"image": images, "mask": masks, "weight": weight}


def per_image(*values):
    return jnp.asarray(values, jnp.float32)


def drawn(ranges, images, masks):
    keys = example_keys(seed_key(0), jnp.int32(0), jnp.arange(len(images)))
    real = np.ones(len(images), bool)
    found = jax.jit(partial(augment, ranges))(keys, images, masks, real)
    return tuple(map(np.asarray, found))


def test_one_resampling_is_that_of_scipy():
    images, masks = pictures(4, 10, 13)
    zooms, angles, flips = (1, 0.6, 1.7, 1), (0, 0.3, -2.5, np.pi / 4), (1, -1, 1, -1)
    shifts = np.array([[0.25, -3], [0, 0], [7, 1.5], [-30, 4]])
    matrix = jax.jit(maps)(
        per_image(*flips), jnp.arange(4), per_image(*zooms), per_image(*angles)
    )
    found, lesion = jax.jit(warp)(images, masks, matrix, jnp.float32(shifts))
    middle = (np.array(images.shape[1:3]) - 1) / 2
    for n in range(4):
        # A flip, then a turn, then the quarter turns, all round the middle.
        cos, sin = np.cos(angles[n]), np.sin(angles[n])
        quarters = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), n)
        whole = (
            quarters @ np.array([[cos, sin], [-sin, cos]]) / zooms[n] @ np.diag([1, flips[n]])
        )
        offset = middle + shifts[n] - whole @ middle
        moved = partial(
            ndimage.affine_transform, matrix=whole, offset=offset, order=1, mode="reflect"
        )
        for c in range(3):
            expected = moved(images[n, ..., c].astype(np.float64))
            np.testing.assert_allclose(found[n, ..., c], expected, atol=0.51)
        truth = moved(masks[n, ..., 0].astype(np.float64))
        sure = np.abs(truth - 127.5) > 0.01
        expected = np.where(truth > 127.5, 255, 0)
        np.testing.assert_array_equal(lesion[n, ..., 0][sure], expected[sure])


def test_flips_and_quarter_turns_move_pixels_as_they_are_and_give_all_eight():
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    images = np.repeat(image, 3, axis=-1).repeat(64, axis=0)
    found, masks = drawn(Ranges(flip=True, quarter_turns=True), images, images[..., :1] % 3)
    eight = [np.rot90(x, k) for x in (image[0], image[0, :, ::-1]) for k in range(4)]
    seen = [[np.array_equal(each, turn.repeat(3, -1)) for turn in eight] for each in found]
    assert np.sum(seen, axis=1).tolist() == [1] * 64
    assert np.sum(seen, axis=0).min() > 0
    np.testing.assert_array_equal(masks, np.where(found[..., :1] % 3 > 0, 255, 0))


def test_a_mask_stays_on_what_it_outlines_and_is_0_or_255():
    side = 32
    y, x = np.mgrid[:side, :side]
    disc = (y - 12) ** 2 + (x - 18) ** 2 < 49
    masks = np.where(disc, 255, 0)[None, ..., None].astype(np.uint8).repeat(8, 0)
    geometry = {f: getattr(STRENGTHS["strong"], f) for f in ("scale", "rotation", "shift")}
    found, lesion = drawn(
        Ranges(flip=True, quarter_turns=True, **geometry), masks.repeat(3, -1), masks
    )
    assert set(np.unique(lesion)) == {0, 255}
    np.testing.assert_array_equal(lesion, np.where(found[..., :1] >= 128, 255, 0))
    # Each is a disc elsewhere, of another size.
    centres = {tuple(np.round(ndimage.center_of_mass(each[..., 0]), 1)) for each in lesion}
    assert len(centres) == 8
    assert np.ptp((lesion > 0).sum((1, 2, 3))) > 50


@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_a_colour_is_changed_as_by_pillow(name, enhance):
    images, _ = pictures(3)
    factors = (0.6, 1.0, 1.3)
    plain = {"brightness": per_image(1, 1, 1), "contrast": per_image(1, 1, 1)}
    plain |= {"saturation": per_image(1, 1, 1), "hue": per_image(0, 0, 0)}
    mean = jnp.asarray(images.mean((1, 2)), jnp.float32)
    found = jax.jit(recolor)(jnp.float32(images), mean, **plain | {name: per_image(*factors)})
    for image, each, factor in zip(images, np.asarray(found), factors, strict=True):
        expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor))
        # Pillow rounds greys to whole numbers, and down.
        np.testing.assert_allclose(each.clip(0, 255), expected, atol=1.1)
    np.testing.assert_array_equal(found[1], images[1])


def test_a_hue_is_turned_round_grey():
    images, _ = pictures(2)
    still, turn = per_image(1, 1), np.radians([30, -120])
    mean = jnp.zeros((2, 3))
    turned = jax.jit(recolor)(jnp.float32(images), mean, still, still, still, per_image(*turn))
    found = np.asarray(turned, np.float64)
    for n in range(2):
        for before, after in zip(
            images[n].reshape(-1, 3), found[n].reshape(-1, 3), strict=True
        ):
            y, i, q = colorsys.rgb_to_yiq(*before.astype(float))
            expected = complex(i, q) * np.exp(1j * turn[n])
            yiq = colorsys.rgb_to_yiq(*after)
            # That of the standard library rounds its coefficients to two digits.
            np.testing.assert_allclose(yiq, (y, expected.real, expected.imag), atol=1.5)


def test_a_blur_is_that_of_scipy_for_each_picture():
    images, _ = pictures(3, 9, 14)
    found = np.asarray(
        jax.jit(partial(blur, most=1.3))(jnp.float32(images), per_image(0, 0.5, 1.3))
    )
    np.testing.assert_array_equal(found[0], images[0])
    for n, deviation in ((1, 0.5), (2, 1.3)):
        expected = ndimage.gaussian_filter(
            images[n].astype(np.float64),
            (deviation, deviation, 0),
            mode="reflect",
            radius=(4, 4, 0),
        )
        np.testing.assert_allclose(found[n], expected, atol=1e-3)


def test_noise_is_normal_alike_in_the_channels_and_of_each_pictures_deviation():
    keys = example_keys(seed_key(0), jnp.int32(0), jnp.arange(2))
    found = np.asarray(jax.jit(add_noise)(keys, jnp.zeros((2, 100, 100, 3)), per_image(2, 5)))
    np.testing.assert_array_equal(found[..., 0], found[..., 1])
    noise = found[..., 0].reshape(2, -1) / [[2], [5]]
    assert np.abs(noise.mean(1)).max() < 0.04
    np.testing.assert_allclose(noise.std(1), 1, atol=0.03)
    np.testing.assert_allclose((np.abs(noise) < 2).mean(), 0.95, atol=0.02)
    assert abs(np.corrcoef(noise)[0, 1]) < 0.04


def test_a_cut_out_is_a_square_of_the_mean_colour():
    pixels = jnp.zeros((2, 10, 20, 3))
    mean = jnp.float32([[1, 2, 3], [4, 5, 6]])
    found = np.asarray(
        cut_out(pixels, mean, jnp.float32([[0, 0], [-1, 1]]), per_image(0.4, 0.5))
    )
    expected = np.zeros((2, 10, 20, 3))
    expected[0, 3:7, 6:14] = [1, 2, 3]
    expected[1, :2, 15:] = [4, 5, 6]
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def alone():
    return varied_on("jit", 1, 3)


def varied_on(parallel, devices, step, batch=None, recipe=None):
    strategy = make_strategy(parallel, jax.devices()[:devices])
    vary = partial(varied, recipe or make_recipe(CONFIG))
    compiled = strategy.compile(vary, outputs="split")
    placed = strategy.split(batch_of(16, real=13) if batch is None else batch)
    return strategy.gather(compiled(strategy.replicate(np.int32(step)), placed))


@pytest.mark.parametrize(("parallel", "devices"), [("pmap", 2), ("jit", 4), ("pmap", 8)])
def test_neither_devices_nor_strategy_change_what_a_picture_becomes(parallel, devices, alone):
    images, masks = varied_on(parallel, devices, 3)
    assert np.abs(images.astype(int) - alone[0]).max() <= 1
    assert (images != alone[0]).mean() < 1e-3
    assert (masks != alone[1]).mean() < 1e-3


def test_padding_stays_and_each_real_picture_is_varied_in_its_own_way(alone):
    batch = batch_of(16)
    for found, name in zip(alone, ("image", "mask"), strict=True):
        np.testing.assert_array_equal(found[13:], batch[name][13:])
        assert (found[:13] != batch[name][:13]).any((1, 2, 3)).all()
    assert set(np.unique(alone[1])) == {0, 255}
    same = {name: rows[:1].repeat(16, 0) for name, rows in batch_of(16).items()}
    images, _ = varied_on("jit", 1, 3, same)
    assert len({image.tobytes() for image in images}) == 16
    again, _ = varied_on("jit", 1, 4, same)
    assert not {image.tobytes() for image in again} & {image.tobytes() for image in images}


def test_ranges_of_nothing_change_nothing():
    nothing = AugmentationConfig(**vars(Ranges()))
    assert nothing.ranges("strong") == STRENGTHS["none"]
    images, masks = pictures(3)
    # Next to nothing goes through all there is, and is rounded away.
    least = Ranges(rotation=1e-6, hue=1e-6, blur=1e-6, noise=1e-6, cutout=1e-6)
    for ranges in (Ranges(), least):
        found, lesion = drawn(ranges, images, masks)
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(lesion, masks)


def test_a_strength_holds_but_for_what_is_asked_for_beside_it():
    asked = AugmentationConfig(rotation=30, flip=False, noise=0)
    found = asked.ranges("strong")
    assert found == replace(STRENGTHS["strong"], rotation=30, flip=False, noise=0)
    assert AugmentationConfig().ranges("flip") == Ranges(flip=True)
    assert [f.name for f in fields(Ranges)] == [f.name for f in fields(AugmentationConfig)]
    for strength in STRENGTHS.values():
        AugmentationConfig(**vars(strength))  # within the limits


def test_a_configuration_of_before_has_no_ranges_and_new_ones_come_back():
    before = to_dict(Config())
    del before["train"]["augmentation"]
    assert from_dict(Config, before) == Config()
    config = Config(train=TrainConfig(augmentation=AugmentationConfig(hue=3.5, flip=False)))
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("scale", 0.8, "from 1 to 4"), ("shift", 0.6, "from 0 to 0.5"), ("noise", -1, "from 0")],
)
def test_a_range_that_makes_no_sense_is_refused(name, value, allowed):
    with pytest.raises(
        ConfigError, match=rf"train\.augmentation\.{name} is {value}.*{allowed}"
    ):
        AugmentationConfig(**{name: value})
