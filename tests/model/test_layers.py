"""Each operation in each platform's form: against PyTorch, NumPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.test_util import check_grads

from jaxunet.model import layers
from jaxunet.model.conv import conv3x3, conv3x3_joined
from jaxunet.model.folding import columns, fold, fold_kernel, merge_columns, split_columns
from jaxunet.model.layers import conv1x1, max_pool2x2, relu, relu6
from jaxunet.model.up_conv import up_conv2x2


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def platform(request, monkeypatch):
    """Runs here what `lax.platform_dependent` would choose on the platform."""

    def choose(*operands, default=None, **forms):
        return forms.get(request.param, default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 8, 4), (1, 1, 1, 3, 2), (2, 4, 4, 64, 32), (1, 2, 2, 128, 64)]
)
def test_the_transposed_convolution_and_its_gradients_are_pytorchs(shape, platform):
    b, h, w, cin, cout = shape
    rng = np.random.default_rng(sum(shape))
    x = rng.normal(size=(b, h, w, cin)).astype(np.float32)
    kernel = rng.normal(size=(2, 2, cin, cout)).astype(np.float32)
    dy = rng.normal(size=(b, 2 * h, 2 * w, cout)).astype(np.float32)
    y, pull_back = jax.vjp(up_conv2x2, jnp.asarray(x), jnp.asarray(kernel))
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    tk = torch.from_numpy(kernel).permute(2, 3, 0, 1).requires_grad_()
    ty = F.conv_transpose2d(tx, tk, stride=2)
    ty.backward(torch.from_numpy(dy).permute(0, 3, 1, 2))
    expected = (ty.detach(), tx.grad)
    for found, each in zip((y, pull_back(jnp.asarray(dy))[0]), expected, strict=True):
        np.testing.assert_allclose(found, each.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    found = pull_back(jnp.asarray(dy))[1]
    np.testing.assert_allclose(found, tk.grad.permute(2, 3, 0, 1).numpy(), atol=2e-4)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 6, 3),
        (1, 7, 9, 2),
        (1, 2, 2, 1),
        (1, 3, 3, 16),
        (2, 4, 8, 32),
        (1, 4, 2, 64),
        (1, 3, 4, 64),
    ],
)
def test_max_pool_and_its_gradient_are_pytorchs_where_maxima_are_tied(shape, platform):
    rng = np.random.default_rng(sum(shape))
    x = rng.integers(0, 3, shape).astype(np.float32)  # few values: most windows have ties
    b, h, w, c = shape
    dy = rng.normal(size=(b, h // 2, w // 2, c)).astype(np.float32)
    y, pull_back = jax.vjp(max_pool2x2, jnp.asarray(x))
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    ty = F.max_pool2d(tx, 2)
    ty.backward(torch.from_numpy(dy).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(y, ty.detach().permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(pull_back(jnp.asarray(dy))[0], tx.grad.permute(0, 2, 3, 1))


def test_max_pool_lets_nan_through(platform):
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    x[0, 0, 0, 0] = x[0, 3, 3, 0] = np.nan
    expected = [[np.nan, 7], [13, np.nan]]
    np.testing.assert_array_equal(max_pool2x2(jnp.asarray(x))[0, :, :, 0], expected)


@pytest.mark.parametrize(("ours", "theirs"), [(relu, F.relu), (relu6, F.relu6)])
def test_relu_and_its_gradient_are_pytorchs_at_the_corners_too(ours, theirs, platform):
    x = np.array([-np.inf, -2, -0.0, 0, 1e-30, 3, 6, 7, np.inf, np.nan], np.float32)
    y, pull_back = jax.vjp(ours, jnp.asarray(x))
    tx = torch.from_numpy(x).requires_grad_()
    ty = theirs(tx)
    ty.backward(torch.full_like(tx, 2.0))
    np.testing.assert_array_equal(y, ty.detach().numpy())
    found = pull_back(jnp.full_like(x, 2.0))[0]
    np.testing.assert_array_equal(found[:-1], tx.grad[:-1])


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 3, 4), (1, 1, 1, 3, 2), (2, 3, 4, 5, 32), (1, 2, 1, 3, 64)]
)
def test_the_transposed_convolution_is_exact_in_float64(shape, platform):
    b, h, w, cin, cout = shape
    rng = np.random.default_rng(sum(shape))
    x, kernel = rng.normal(size=(b, h, w, cin)), rng.normal(size=(2, 2, cin, cout))
    dy = rng.normal(size=(b, 2 * h, 2 * w, cout))
    blocks = dy.reshape(b, h, 2, w, 2, cout)
    with jax.enable_x64(True):
        y, pull_back = jax.vjp(up_conv2x2, jnp.asarray(x), jnp.asarray(kernel))
        dx, dkernel = pull_back(jnp.asarray(dy))
    expected = np.einsum("bhwi,klio->bhkwlo", x, kernel).reshape(dy.shape)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(dx, np.einsum("bhkwlo,klio->bhwi", blocks, kernel), atol=1e-12)
    np.testing.assert_allclose(dkernel, np.einsum("bhkwlo,bhwi->klio", blocks, x), atol=1e-12)


def test_second_derivatives_are_those_of_finite_differences(platform):
    rng = np.random.default_rng(0)
    # Numbers at least 0.1 from each other and from 0, so that no difference meets an edge.
    x = (rng.permutation(2 * 5 * 4 * 2) - 40.5).reshape(2, 5, 4, 2) / 10
    kernel = rng.normal(size=(2, 2, 2, 3))

    def total(x, kernel):
        return jnp.sin(up_conv2x2(max_pool2x2(relu(x) ** 2), kernel)).sum()

    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
        check_grads(gradients, (x, kernel), order=1, modes=["rev"])


def shifted_products(x, kernel):
    """A 3x3 convolution in float64: the sum of nine shifted matrix products."""
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i, j in taps)


# Two columns folded into one, four, and none as their number is odd.
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 64), (1, 4, 8, 3, 32), (1, 3, 5, 6, 64)])
@pytest.mark.parametrize("channels", [None, 2])
def test_convolutions_are_exact_in_float64(shape, channels, platform):
    b, h, w, cin, cout = shape
    rng = np.random.default_rng(sum(shape))
    x, kernel = rng.normal(size=(b, h, w, cin)), rng.normal(size=(3, 3, cin, cout))
    dy = rng.normal(size=(b, h, w, cout))

    def convolve(x, kernel):
        if channels is None:
            return conv3x3(x, kernel)
        return conv3x3_joined(x[..., :channels], x[..., channels:], kernel)

    with jax.enable_x64(True):
        y, pull_back = jax.vjp(convolve, jnp.asarray(x), jnp.asarray(kernel))
        dx, dkernel = pull_back(jnp.asarray(dy))
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    np.testing.assert_allclose(y, shifted_products(x, kernel), atol=1e-11)
    np.testing.assert_allclose(dx, shifted_products(dy, turned), atol=1e-11)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(3):
        for j in range(3):
            tap = np.einsum("bhwi,bhwo->io", padded[:, i : i + h, j : j + w], dy)
            np.testing.assert_allclose(dkernel[i, j], tap, atol=1e-11)


# Eight columns folded into one, and three channels beside many.
@pytest.mark.parametrize("shape", [(2, 8, 16, 32, 16), (2, 8, 8, 3, 64)])
@pytest.mark.parametrize("operation", [conv3x3, up_conv2x2])
def test_in_bfloat16_a_kernels_gradient_is_rounded_once(operation, shape, platform):
    b, h, w, cin, cout = shape
    rng = np.random.default_rng(sum(shape))
    side, step = (3, 1) if operation is conv3x3 else (2, 2)
    shapes = (b, h, w, cin), (side, side, cin, cout), (b, step * h, step * w, cout)
    x, kernel, dy = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
    found = np.asarray(jax.vjp(operation, x, kernel)[1](dy)[1], np.float64)
    x, dy = (np.asarray(a, np.float64) for a in (x, dy))
    if operation is conv3x3:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        places = [[(padded[:, i : i + h, j : j + w], dy) for j in range(3)] for i in range(3)]
    else:
        places = [[(x, dy[:, i::2, j::2]) for j in range(2)] for i in range(2)]
    expected = np.asarray(
        [[np.einsum("bhwi,bhwo->io", *place) for place in row] for row in places]
    )
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 2e-3  # one rounding makes 1.66e-3


# Called by itself, in float32: XLA's CPU backend has no such product in bfloat16.
@pytest.mark.parametrize(("width", "channels", "logits"), [(4, 64, 1), (8, 16, 2), (3, 64, 1)])
def test_the_1x1_convolution_of_a_tpu_is_the_product(width, channels, logits):
    rng = np.random.default_rng(width)
    shapes = (2, 3, width, channels), (channels, logits), (2, 3, width, logits)
    x, kernel, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    y, dkernel = layers._filled_product(x, kernel), layers._filled_kernel_gradient(x, dy)
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    np.testing.assert_allclose(y, x @ kernel, atol=1e-5)
    np.testing.assert_allclose(dkernel, np.einsum("bhwi,bhwo->io", x, dy), atol=1e-4)


def test_the_1x1_convolution_and_its_gradients_are_the_products():
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.normal(size=shape) for shape in ((2, 3, 4, 5), (5, 2), (2, 3, 4, 2)))
    y, pull_back = jax.vjp(conv1x1, *(jnp.asarray(a, jnp.float32) for a in (x, kernel)))
    dx, dkernel = pull_back(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(y, x @ kernel, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(dkernel, np.einsum("bhwi,bhwo->io", x, dy), atol=1e-5)


def test_second_derivatives_of_convolutions_are_those_of_finite_differences(platform):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 3, 4, 3)), rng.normal(size=(3, 3, 3, 64)) / 5

    def total(x, kernel):
        y = jnp.sin(conv3x3(x, kernel)) + conv3x3_joined(x[..., :1], x[..., 1:], kernel) ** 2
        return jnp.sum(y**2)

    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
        check_grads(gradients, (x, kernel), order=1, modes=["rev"])


def test_columns_are_folded_until_a_vector_is_full():
    found = [columns(256, channels) for channels in (1, 16, 20, 64, 65, 128, 512)]
    assert found == [128, 8, 4, 2, 1, 1, 1]
    assert columns(6, 16) == columns(7, 64) == 1


def test_folded_columns_part_and_meet_again():
    x = jnp.arange(2 * 3 * 8 * 4.0).reshape(2, 3, 8, 4)
    even, odd = split_columns(fold(x, 4), 4)
    np.testing.assert_array_equal(even, fold(x[:, :, ::2], 2))
    np.testing.assert_array_equal(odd, fold(x[:, :, 1::2], 2))
    np.testing.assert_array_equal(merge_columns(even, odd, 4), fold(x, 4))


def test_a_folded_kernel_holds_each_tap_once_for_each_column():
    kernel = jnp.arange(1.0, 1 + 9 * 2 * 3).reshape(3, 3, 2, 3)
    folded = np.asarray(fold_kernel(kernel, 4))
    assert folded.shape == (3, 3, 8, 12)
    counts = np.unique(folded[folded > 0], return_counts=True)[1]
    assert (counts == 4).all()
    assert len(counts) == 9 * 2 * 3


def test_operations_keep_bfloat16(platform):
    x = jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16).reshape(1, 4, 4, 4)
    kernel = jnp.ones((2, 2, 4, 2), jnp.bfloat16)
    y, pull_back = jax.vjp(lambda x, k: up_conv2x2(max_pool2x2(relu(x)), k), x, kernel)
    assert {leaf.dtype for leaf in (y, *pull_back(y))} == {jnp.dtype(jnp.bfloat16)}
