"""Batch norm over several steps, with small variances and its own weights, as PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxunet.model.normalization import BatchNorm

RNG = np.random.default_rng(0)
SCALE, BIAS = np.array([0.5, 2.0], np.float32), np.array([1.0, -3.0], np.float32)
NORM = BatchNorm(axis_name=None)


def start(shape=(4, 3, 5, 2)):
    key = jax.random.key(0, impl="rbg")
    variables = NORM.init(key, jnp.ones(shape), jnp.ones(shape[0], bool), train=True)
    assert variables["batch_stats"]["mean"].tolist() == [0, 0]
    assert variables["batch_stats"]["var"].tolist() == [1, 1]
    return {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": variables["batch_stats"]}


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("spread", [2.0, 0.003])  # a variance about epsilon's
def test_three_steps_and_then_evaluation_are_pytorchs(spread):
    theirs = torch.nn.BatchNorm2d(2)
    theirs.load_state_dict(
        {"weight": torch.tensor(SCALE), "bias": torch.tensor(BIAS)}, strict=False
    )
    variables = start()
    for real in ([0, 1, 2, 3], [0, 2], [1, 2, 3]):
        x = jnp.asarray(RNG.normal(3, spread, (4, 3, 5, 2)), jnp.float32)
        weight = jnp.zeros(4, bool).at[jnp.array(real)].set(True)
        y, changed = NORM.apply(variables, x, weight, train=True, mutable=["batch_stats"])
        variables = {**variables, **changed}
        expected = theirs(nchw(x[jnp.array(real)])).permute(0, 2, 3, 1).detach().numpy()
        np.testing.assert_allclose(y[jnp.array(real)], expected, atol=1e-3)
        stats = variables["batch_stats"]
        np.testing.assert_allclose(stats["mean"], theirs.running_mean.numpy(), rtol=1e-5)
        np.testing.assert_allclose(stats["var"], theirs.running_var.numpy(), rtol=1e-5)
    x = jnp.asarray(RNG.normal(3, spread, (2, 3, 5, 2)), jnp.float32)
    found = NORM.apply(variables, x, jnp.ones(2, bool), train=False)
    expected = theirs.eval()(nchw(x)).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_single_pixel_has_no_variance_and_padding_alone_is_finite():
    variables, x = start(), jnp.full((1, 1, 1, 2), 7.0)
    y, changed = NORM.apply(
        variables, x, jnp.ones(1, bool), train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y.ravel(), BIAS)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], [0.7, 0.7], rtol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["var"], [0.9, 0.9], rtol=1e-6)
    y, _ = NORM.apply(variables, x, jnp.zeros(1, bool), train=True, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    # Of two pixels the unbiased variance is twice the biased.
    x = jnp.array([3.0, 7.0]).reshape(1, 1, 2, 1).repeat(2, axis=-1)
    _, changed = NORM.apply(
        variables, x, jnp.ones(1, bool), train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(changed["batch_stats"]["var"], [0.9 + 0.8] * 2, rtol=1e-6)


def test_statistics_are_taken_over_the_named_axis():
    x = jnp.asarray(RNG.normal(3, 2, (2, 2, 3, 5, 2)), jnp.float32)
    weight = jnp.array([[True, True], [True, False]])
    variables = start()

    def both(axis_name):
        return lambda x, weight: BatchNorm(axis_name).apply(
            variables, x, weight, train=True, mutable=["batch_stats"]
        )

    found, changed = jax.vmap(both("shards"), axis_name="shards")(x, weight)
    together, expected = both(None)(x.reshape(4, 3, 5, 2), weight.reshape(4))
    np.testing.assert_allclose(found.reshape(4, 3, 5, 2), together, atol=1e-5)
    for name in ("mean", "var"):
        for shard in range(2):
            np.testing.assert_allclose(
                changed["batch_stats"][name][shard], expected["batch_stats"][name], rtol=1e-5
            )


def test_low_precision_keeps_its_type_and_takes_statistics_in_float32():
    x = jnp.asarray(RNG.normal(300, 1, (4, 8, 8, 2)), jnp.bfloat16)
    y, changed = NORM.apply(start(), x, jnp.ones(4, bool), train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    assert changed["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(
        changed["batch_stats"]["mean"], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5
    )
    expected = 0.9 + 0.1 * exact.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(changed["batch_stats"]["var"], expected, rtol=1e-4)
