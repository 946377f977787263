"""The CPU's own formulations against plain ones, in float64, and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxunet.model.conv import conv3x3

# By rule: loops where the processor has them (rows of one to several blocks, each edge of an
# image, channels of whole blocks and others, near and far ones, strips that end with an image,
# several parts), XLA's own convolution for some, Winograd.
SHAPES = [
    (2, 9, 7, 24, 40),
    (2, 12, 7, 24, 40),
    (3, 16, 20, 17, 8),
    (2, 9, 7, 3, 8),
    (1, 11, 10, 16, 12),
    (2, 6, 5, 1, 16),
    (1, 128, 129, 16, 16),
    (2, 34, 32, 16, 24),
    (1, 1, 1100, 20, 16),
    (2, 8, 8, 64, 64),
    (1, 9, 7, 64, 96),
    (1, 1, 1, 64, 64),
    (1, 1, 4, 16, 16),
    (3, 2, 5, 3, 32),
    (2, 5, 16, 16, 16),
    (1, 40, 33, 41, 48),
    (5, 3, 300, 40, 16),
    (2, 70, 130, 16, 16),
    (1, 8, 8, 136, 32),
    (3, 19, 18, 128, 256),
    (1, 33, 32, 256, 136),
]


def operands(b, h, w, cin, cout):
    rng = np.random.default_rng(b * h * w * cin + cout)
    x = rng.normal(size=(b, h, w, cin))
    kernel = rng.normal(size=(3, 3, cin, cout))
    return x, kernel, rng.normal(size=(b, h, w, cout))


def by_hand(x, kernel, dy):
    """Output and both gradients in float64: nine shifted matrix products."""
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, padded_dx, dkernel = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(kernel)
    for i in range(3):
        for j in range(3):
            shifted = padded[:, i : i + h, j : j + w]
            y += shifted @ kernel[i, j]
            padded_dx[:, i : i + h, j : j + w] += dy @ kernel[i, j].T
            dkernel[i, j] = np.einsum("bhwi,bhwo->io", shifted, dy)
    return y, padded_dx[:, 1:-1, 1:-1], dkernel


@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_and_both_gradients_are_exact_to_rounding(shape):
    x, kernel, dy = operands(*shape)

    @jax.jit
    def all_three(x, kernel, dy):
        y, pull_back = jax.vjp(conv3x3, x, kernel)
        return y, *pull_back(dy)

    found = all_three(*(jnp.asarray(a, jnp.float32) for a in (x, kernel, dy)))
    for name, a, b in zip(("y", "dx", "dkernel"), found, by_hand(x, kernel, dy), strict=True):
        error = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
        assert error < 3e-6, (name, error)


@pytest.mark.parametrize("shape", [(2, 12, 14, 64, 64), (1, 128, 128, 16, 16)])
def test_convolution_is_as_exact_as_pytorchs(shape):
    x, kernel, dy = operands(*shape)
    exact = by_hand(x, kernel, dy)
    found = conv3x3(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    images = torch.from_numpy(x).float().permute(0, 3, 1, 2)
    theirs = F.conv2d(images, torch.from_numpy(kernel).float().permute(3, 2, 0, 1), padding=1)
    error = np.abs(np.asarray(found) - exact[0]).max()
    reference = np.abs(theirs.permute(0, 2, 3, 1).numpy() - exact[0]).max()
    assert error < 10 * reference


def test_bfloat16_keeps_its_type_and_its_precision():
    x, kernel, dy = operands(1, 8, 8, 64, 64)
    found = conv3x3(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    expected = by_hand(x, kernel, dy)[0]
    assert np.abs(np.asarray(found, np.float32) - expected).max() < 0.02 * expected.std() * 9
