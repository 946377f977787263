from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxunet.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.errors import ConfigError, RunError
from jaxunet.learning.optim import extend_schedule, make_optimizer, make_schedule, update_ema
from jaxunet.learning.steps import init_state, make_recipe

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


def theirs(make, steps=50, clip=None):
    w = torch.tensor(START, requires_grad=True)
    optimizer = make([w])
    path = []
    for i in range(steps):
        error = torch.tensor(MATRICES[i]) @ w - torch.tensor(TARGETS[i])
        (error**2).mean().backward()
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
    ],
    ids=["adam", "adamw", "sgd", "clipping"],
)
def test_fifty_steps_are_pytorchs(config, make, options):
    found = ours(OptimizerConfig(learning_rate=0.05, **config))
    np.testing.assert_allclose(found, theirs(make, **options), rtol=2e-4, atol=2e-5)


def test_the_schedules_rates_reach_the_optimizer():
    config = OptimizerConfig("sgd", learning_rate=2.0, momentum=0.0, schedule="cosine")
    optimizer = make_optimizer(config, 4)
    state, steps = optimizer.init(jnp.float32(0)), []
    for _ in range(4):
        step, state = optimizer.update(jnp.float32(1), state)
        steps.append(float(step))
    assert steps == pytest.approx([-1 - np.cos(np.pi * n / 4) for n in range(4)], abs=1e-6)


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


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_as_long_as_the_run_is_refused(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_steps=8)
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps is 8.*only 8 updates"):
        make_schedule(config, 8)
    make_schedule(config, 9)


def test_a_warm_up_given_as_a_share_fits_runs_of_any_length():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_fraction=0.25)
    for total in (1, 2, 3, 8, 400):
        schedule = make_schedule(config, total)
        rates = [float(schedule(n)) for n in range(total)]
        assert np.argmax(rates) == min(round(total / 4), total - 1)
        assert max(rates) == 1
    # However large the share, the last update is at the peak.
    for total in (1, 2, 3):
        schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_fraction=0.9), total)
        assert float(schedule(total - 1)) == 1
    with pytest.raises(ConfigError, match=r"warmup_fraction is 0.25.*warmup_steps is given"):
        OptimizerConfig(warmup_fraction=0.25, warmup_steps=3)


def test_without_a_length_nothing_is_refused_and_the_state_is_the_same():
    config = Config(
        model=ModelConfig(width=2, depth=2),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=100, clip_norm=1.0),
    )
    states = [
        jax.eval_shape(partial(init_state, make_recipe(config, total))) for total in (None, 101)
    ]
    assert states[0] == states[1]
    assert float(make_schedule(config.optimizer, None)(0)) == config.optimizer.learning_rate


@pytest.mark.parametrize(("n", "decay"), [(1, 2 / 11), (10, 11 / 20), (26, 0.75), (9999, 0.75)])
def test_the_moving_average_forgets_its_start_and_then_keeps_its_decay(n, decay):
    before, now = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}
    ema = update_ema(before, now, 0.75, jnp.int32(n))
    expected = decay * before["w"] + (1 - decay) * now["w"]
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-6)


def run_of(epochs, schedule="cosine", **options):
    optimizer = OptimizerConfig(learning_rate=1.0, schedule=schedule, **options)
    return Config(optimizer=optimizer, train=TrainConfig(epochs=epochs))


def rates(config, first, stop):
    schedule = make_schedule(config.optimizer, config.train.epochs * 10)
    return [float(schedule(n)) for n in range(first, stop)]


def test_a_cosine_made_longer_without_a_word_is_refused_with_both_rates():
    # 5 epochs of 10 updates end at (1 + cos(49/50 pi))/2; of 10 epochs, update 50 is at 0.5.
    with pytest.raises(ConfigError, match=r"from 0\.000987 to 0\.5\. .*hold.*cycle.*stretch"):
        extend_schedule(run_of(5), run_of(10), 10, 50)
    # The same in the middle of the run, and towards fewer epochs.
    with pytest.raises(ConfigError, match=r"--optimizer\.extend"):
        extend_schedule(run_of(5), run_of(4), 10, 20)


def test_a_run_that_is_not_begun_or_not_longer_goes_on_as_it_is():
    assert extend_schedule(run_of(5), run_of(10), 10, 0) == run_of(10)
    assert extend_schedule(run_of(5), run_of(5), 10, 20) == run_of(5)


def test_held_rates_stay_what_they_were_last():
    longer = extend_schedule(run_of(5), run_of(10, extend="hold"), 10, 50)
    assert longer.optimizer.extended_at == (50,)
    assert rates(longer, 0, 50) == rates(run_of(5), 0, 50)
    assert rates(longer, 50, 100) == [rates(run_of(5), 49, 50)[0]] * 50
    # Longer still, without saying it again: the same rate, not that of a stretched cosine.
    again = extend_schedule(longer, run_of(20), 10, 100)
    assert rates(again, 50, 200) == [rates(run_of(5), 49, 50)[0]] * 150


def test_cycles_start_at_the_peak_and_end_at_nothing_each():
    longer = extend_schedule(run_of(5), run_of(10, extend="cycle"), 10, 50)
    longest = extend_schedule(longer, run_of(12), 10, 100)
    assert longest.optimizer.extended_at == (50, 100)
    assert rates(longest, 0, 50) == rates(longest, 50, 100) == rates(run_of(5), 0, 50)
    np.testing.assert_allclose(rates(longest, 100, 120), rates(run_of(2), 0, 20), atol=1e-6)


def test_a_stretched_cosine_is_that_of_the_new_length():
    longer = extend_schedule(run_of(5), run_of(10, extend="stretch"), 10, 50)
    assert rates(longer, 0, 100) == rates(run_of(10), 0, 100)


def test_a_run_stopped_early_and_made_longer_first_ends_its_cosine():
    longer = extend_schedule(run_of(5), run_of(10, extend="cycle"), 10, 20)
    assert rates(longer, 20, 50) == rates(run_of(5), 20, 50)
    shorter = extend_schedule(run_of(5), run_of(4, extend="hold"), 10, 20)
    assert rates(shorter, 20, 40) == rates(run_of(5), 20, 40)


def test_a_run_made_longer_and_then_as_short_as_before_has_its_first_cosine():
    longer = run_of(5, extend="cycle", extended_at=(50,))
    assert rates(longer, 0, 50) == rates(run_of(5), 0, 50)
    again = extend_schedule(longer, run_of(10), 10, 50)
    assert again.optimizer.extended_at == (50,)


def test_a_run_of_one_update_made_longer_keeps_where_it_ended():
    longer = extend_schedule(run_of(1), run_of(3, extend="hold"), 1, 1)
    assert longer.optimizer.extended_at == (1,)


def test_what_a_longer_run_was_given_stays_through_a_resume_and_can_not_be_changed():
    longer = extend_schedule(run_of(5), run_of(10, extend="hold"), 10, 50)
    assert extend_schedule(longer, run_of(10), 10, 70) == longer
    with pytest.raises(RunError, match=r"extend hold before.*'cycle'"):
        extend_schedule(longer, run_of(20, extend="cycle"), 10, 70)


def test_a_constant_rate_that_is_made_longer_does_not_warm_up_again():
    options = {"schedule": "constant", "warmup_fraction": 0.5}
    longer = extend_schedule(run_of(2, **options), run_of(20, **options), 10, 20)
    assert rates(longer, 0, 20) == rates(run_of(2, **options), 0, 20)
    assert rates(longer, 20, 200) == [1.0] * 180
    # Without a warm-up nothing needs to be kept.
    plain = run_of(20, "constant")
    assert extend_schedule(run_of(2, "constant"), plain, 10, 20) == plain
