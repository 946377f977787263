import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxunet.config import ModelConfig
from jaxunet.model.encoders.plain import EncoderLevel
from jaxunet.model.layers import max_pool2x2
from jaxunet.model.normalization import BatchNorm
from jaxunet.model.resizing import center_crop, center_pad, upsample_bilinear
from jaxunet.model.unet import count_parameters, make_unet

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default


def shapes_of(config: ModelConfig, *image_shape: int):
    model = make_unet(config)
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(model.init, key, images)
    return variables, jax.eval_shape(model.apply, variables, images)


def test_reference_has_the_published_number_of_parameters():
    variables, _ = shapes_of(ModelConfig(), 1, 256, 256, 3)
    assert count_parameters(variables["params"]) == 31_031_745


@pytest.mark.parametrize(
    ("side", "out"), [(256, 256), (572, 560), (16, 16), (17, 16), (31, 16), (47, 32)]
)
def test_reference_output_is_cropped_to_what_the_poolings_leave(side, out):
    _, logits = shapes_of(ModelConfig(), 2, side, side + 1, 3)
    assert logits.shape == (2, out, (side + 1) // 16 * 16, 1)
    assert logits.dtype == jnp.float32


def test_skip_pad_keeps_the_size_of_odd_inputs():
    _, logits = shapes_of(ModelConfig(skip="pad"), 1, 37, 61, 3)
    assert logits.shape == (1, 37, 61, 1)


def test_center_crop_and_pad_put_the_odd_row_on_the_far_side():
    x = jnp.arange(5.0).reshape(1, 5, 1, 1)
    assert center_crop(x, 2, 1).ravel().tolist() == [1, 2]
    assert center_pad(x[:, :2], 5, 1).ravel().tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(1, 3), (4, 4), (5, 7)])
def test_bilinear_upsampling_is_pytorchs_with_aligned_corners(height, width):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 3)), jnp.float32)
    up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    expected = up(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(upsample_bilinear(jnp.asarray(x)), expected, atol=1e-5)


def test_batch_norm_is_pytorchs_on_the_real_examples_only():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2, 3, size=(4, 5, 6, 3)), jnp.float32)
    weight = jnp.array([True, True, True, False])
    norm = BatchNorm(axis_name=None)
    variables = norm.init(KEY, x, weight, train=False)
    y, updated = norm.apply(variables, x, weight, train=True, mutable=["batch_stats"])

    theirs = torch.nn.BatchNorm2d(3)
    expected = theirs(torch.tensor(np.asarray(x[:3])).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(y[:3], expected.detach().numpy(), atol=1e-5)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], theirs.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], theirs.running_var.numpy(), rtol=1e-5)


def test_group_norm_uses_groups_of_the_configured_width():
    config = ModelConfig(width=8, depth=2, norm="group")
    model = make_unet(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = model.init(KEY, x)
    # Without shared statistics, an example's logits don't depend on its neighbours.
    both, alone = model.apply(variables, x), model.apply(variables, x[:1])
    np.testing.assert_allclose(both[:1], alone, atol=1e-5)
    plain = make_unet(ModelConfig(width=8, depth=2)).apply(
        {"params": jax.tree.map(lambda p: p, variables["params"])}, x
    )
    assert np.abs(both - plain).max() > 1e-3


def test_rematerialisation_changes_no_gradient():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
    grads = []
    for remat in (False, True):
        model = make_unet(ModelConfig(width=4, depth=3, remat=remat))
        params = model.init(KEY, x)

        def loss(p, model=model):
            return jnp.sum(model.apply(p, x) ** 2)

        assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) == remat
        grads.append(jax.grad(loss)(params))
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_computes_low_and_keeps_parameters_and_logits_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 3)), jnp.float32)
    exact = make_unet(ModelConfig(width=8, depth=3))
    low = make_unet(ModelConfig(width=8, depth=3, dtype="bfloat16"))
    variables = low.init(KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    a, b = exact.apply(variables, x), low.apply(variables, x)
    assert b.dtype == jnp.float32
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 1e-5 < error < 0.03


def test_he_initialisation_has_the_published_variance_and_no_bias():
    model = make_unet(ModelConfig(width=32, depth=2, init="he"))
    params = model.init(KEY, jnp.zeros((1, 2, 2, 3)))["params"]
    layer = params["encoder"]["level_1"]["conv_1"]
    assert float(layer["kernel"].std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert not layer["bias"].any()


def test_group_norm_is_pytorchs_where_its_epsilon_counts():
    config = ModelConfig(width=4, depth=2, norm="group")
    x = 1e-2 * np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    level = EncoderLevel(config, 8, None, train=True)
    weight = jnp.ones(2, bool)
    variables = level.init(KEY, jnp.asarray(x), weight)
    expected = torch.tensor(x).permute(0, 3, 1, 2)
    for i in range(2):
        kernel, bias = (
            torch.tensor(np.asarray(variables["params"][f"conv_{i}"][name]))
            for name in ("kernel", "bias")
        )
        expected = F.conv2d(expected, kernel.permute(3, 2, 0, 1), bias, padding=1)
        expected = F.relu(F.group_norm(expected, 4, eps=1e-5))
    found = level.apply(variables, jnp.asarray(x), weight)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-3)


def test_max_pooling_passes_a_nan_on_as_pytorchs_does():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    x[0, 1, 2, 0] = np.nan
    expected = F.max_pool2d(torch.tensor(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert np.isnan(expected).sum() == 1
    np.testing.assert_array_equal(max_pool2x2(jnp.asarray(x)), expected)
