import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxunet.config import OptimizerConfig
from jaxunet.errors import ConfigError
from jaxunet.optim import make_optimizer, make_schedule, update_ema

RNG = np.random.default_rng(0)
MATRICES = RNG.normal(size=(50, 4, 6)).astype(np.float32)
TARGETS = RNG.normal(size=(50, 4)).astype(np.float32)
START = RNG.normal(size=6).astype(np.float32)


def loss(w, i):
    return ((MATRICES[i] @ w - TARGETS[i]) ** 2).mean()


def ours(config, steps=50):
    optimizer = make_optimizer(config, steps)
    w = jnp.asarray(START)
    state = optimizer.init(w)
    path = []
    for i in range(steps):
        updates, state = optimizer.update(jax.grad(loss)(w, i), state, w)
        w = optax.apply_updates(w, updates)
        path.append(np.asarray(w))
    return np.array(path)


def theirs(make, steps=50, clip=None, accumulate=1):
    w = torch.tensor(START, requires_grad=True)
    optimizer = make([w])
    path = []
    for i in range(steps):
        error = torch.tensor(MATRICES[i]) @ w - torch.tensor(TARGETS[i])
        ((error**2).mean() / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_([w], clip)
            optimizer.step()
            optimizer.zero_grad()
        path.append(w.detach().numpy().copy())
    return np.array(path)


@pytest.mark.parametrize(
    ("config", "make", "options"),
    [
        ({"name": "adam"}, lambda p: torch.optim.Adam(p, 0.05), {}),
        (
            {"name": "adamw", "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
            {},
        ),
        ({"name": "sgd"}, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), {}),
        (
            {"name": "sgd", "momentum": 0.5, "clip_norm": 0.3},
            lambda p: torch.optim.SGD(p, 0.05, momentum=0.5),
            {"clip": 0.3},
        ),
        (
            {"name": "adam", "accumulate_steps": 5},
            lambda p: torch.optim.Adam(p, 0.05),
            {"accumulate": 5},
        ),
    ],
    ids=["adam", "adamw", "sgd", "clipping", "accumulation"],
)
def test_fifty_steps_are_pytorchs(config, make, options):
    found = ours(OptimizerConfig(learning_rate=0.05, **config))
    np.testing.assert_allclose(found, theirs(make, **options), rtol=2e-4, atol=2e-5)


def test_cosine_with_warm_up_passes_through_its_known_points():
    schedule = make_schedule(
        OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=10), 110
    )
    points = [float(schedule(n)) for n in (0, 5, 10, 35, 60, 110)]
    expected = [0, 1, 2, 1 + np.cos(np.pi / 4), 1, 0]
    assert points == pytest.approx(expected, abs=1e-6)


def test_constant_rates_stay_after_the_warm_up():
    assert float(make_schedule(OptimizerConfig(learning_rate=0.5), 10)(9)) == 0.5
    warm = make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=4), 10)
    assert [float(warm(n)) for n in (0, 2, 4, 9)] == pytest.approx([0, 0.25, 0.5, 0.5])


def test_a_warm_up_longer_than_the_run_is_refused():
    config = OptimizerConfig(schedule="cosine", warmup_steps=10)
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps is 10.*only 8 updates"):
        make_schedule(config, 8)


def test_the_moving_average_follows_its_formula():
    ema = update_ema({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}, 0.75)
    assert ema["w"].tolist() == [1.5, 1.5]
