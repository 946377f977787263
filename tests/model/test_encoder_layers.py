import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxunet.model import cpu, depthwise, pooling
from jaxunet.model.depthwise import depthwise_conv
from jaxunet.model.pooling import max_pool3x3


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("form", ["loops", "shifted", "grouped"])
@pytest.mark.parametrize(
    ("size", "stride", "sides", "padding"),
    [
        (3, 1, (5, 8), ((1, 1), (1, 1))),
        (5, 1, (6, 3), ((2, 2), (2, 2))),
        (3, 2, (7, 8), ((1, 1), (0, 1))),
        (5, 2, (8, 9), ((1, 2), (2, 2))),
        (5, 2, (1, 2), ((2, 2), (1, 2))),
    ],
)
def test_depthwise_convolution_and_its_gradients_are_pytorchs(
    form, size, stride, sides, padding, monkeypatch
):
    def chosen(*operands, default, **forms):
        return (default if form == "grouped" else forms["cpu"])(*operands)

    if form == "loops" and cpu.blocks() is None:
        pytest.skip("no loops for this machine")
    monkeypatch.setattr(depthwise.lax, "platform_dependent", chosen)
    monkeypatch.setattr(depthwise, "PART_PIXELS", 16)
    if form == "shifted":
        monkeypatch.setattr(depthwise, "_loops_can", lambda *_: False)
    depthwise._forms.cache_clear()
    # Blocks of four vectors, vectors, and single channels, on every processor.
    channels = 93
    x, kernel = normal(0, 2, *sides, channels), normal(1, size, size, 1, channels)
    images = nchw(x).double().requires_grad_()
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).double().requires_grad_()
    (top, bottom), (left, right) = padding
    padded = F.pad(images, (left, right, top, bottom))
    expected = F.conv2d(padded, weight, stride=stride, groups=channels)
    dy = normal(2, *expected.detach().permute(0, 2, 3, 1).shape)
    expected.backward(nchw(dy).double())

    @jax.jit
    def both(x, kernel, dy):
        y, back = jax.vjp(lambda x, k: depthwise_conv(x, k, stride, padding), x, kernel)
        return y, *back(dy)

    compiled = both.lower(x, kernel, dy).compile()
    depthwise._forms.cache_clear()
    assert ("jaxunet.depthwise" in compiled.as_text()) == (form == "loops")
    y, dx, dkernel = compiled(x, kernel, dy)
    np.testing.assert_allclose(y, expected.detach().permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, images.grad.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dkernel, weight.grad.permute(2, 3, 1, 0), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", ["tpu", "default"])
@pytest.mark.parametrize("sides", [(6, 8), (7, 5), (1, 2)])
def test_max_pool3x3_and_its_gradient_are_pytorchs(sides, form, monkeypatch):
    monkeypatch.setattr(
        pooling.lax, "platform_dependent", lambda *operands, **forms: forms[form](*operands)
    )
    # Few values, so that many maxima are tied.
    x = np.round(normal(0, 2, *sides, 3))
    images = nchw(x).requires_grad_()
    expected = F.max_pool2d(images, 3, 2, 1)
    dy = normal(1, *expected.detach().permute(0, 2, 3, 1).shape)
    expected.backward(nchw(dy))
    y, back = jax.vjp(max_pool3x3, jnp.asarray(x))
    np.testing.assert_array_equal(y, expected.detach().permute(0, 2, 3, 1))
    np.testing.assert_allclose(
        back(jnp.asarray(dy))[0], images.grad.permute(0, 2, 3, 1), rtol=1e-6
    )


@pytest.mark.parametrize(("platform", "scatters"), [("cuda", False), ("tpu", True)])
def test_only_a_tpus_gradient_of_max_pool3x3_scatters(platform, scatters):
    traced = jax.jit(jax.grad(lambda x: max_pool3x3(x).sum())).trace(jnp.zeros((1, 8, 8, 1)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("select_and_scatter" in text) == scatters
