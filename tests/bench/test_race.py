"""A race on a small card: what is kept of it when a contestant fails."""

import copy
import shutil
import stat

import jax
import pytest
import torch

from jaxunet.bench import card, pytorch, race
from jaxunet.bench.setting import Setting, Timing
from jaxunet.bench.steps import StepContestant
from jaxunet.config import Config, DataConfig, ModelConfig, TrainConfig

CONFIG = Config(
    data=DataConfig(image_size=8),
    model=ModelConfig(width=2, depth=2),
    train=TrainConfig(batch_size=2, eval_batch_size=2, augment="none"),
)
FORMS = ("channels_last", "compile", "eager")


@pytest.fixture
def ours(monkeypatch):
    """jaxunet's step and PyTorch's without their compilers."""
    step = StepContestant(lambda: None, 0.0, None, 0.0, 1, 0.7, None)
    monkeypatch.setattr(race, "make_step", lambda *_: step)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # minutes


def run(modes=("train",)):
    """The point at each time it was saved."""
    point, saved = {}, []
    timing = Timing(modes, "pytorch", FORMS, rounds=1, seconds=0.0)
    setting = Setting(CONFIG, "jit", 1)
    race.measure_steps(setting, timing, 1e9, point, lambda: saved.append(copy.deepcopy(point)))
    return saved


def fail(form, error, monkeypatch):
    make = pytorch._make

    def failing(this, *rest):
        if this == "compile" and form == "making":
            raise error
        found = make("eager", *rest)
        if this == "compile":
            calls = iter(range(100))

            def step():
                if next(calls):
                    raise error

            found.step = step
        return found

    monkeypatch.setattr(pytorch, "_make", failing)


@pytest.mark.parametrize("when", ["making", "racing"])
def test_a_form_without_memory_is_recorded_and_the_rest_goes_on(when, ours, monkeypatch):
    fail(when, torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nmore"), monkeypatch)
    saved = run()
    assert [list(each["train"].get("pytorch", ())) for each in saved] == [
        [],
        ["channels_last"],
        ["channels_last"],
        ["channels_last", "eager"],
    ]
    reason = saved[-1]["train"]["pytorch_unavailable"]["compile"]
    assert reason.startswith("out of memory: ")
    assert reason.endswith("CUDA out of memory. Tried 9 GiB.")
    assert saved[-1]["train"]["pytorch_best"] in ("channels_last", "eager")


def test_another_error_in_the_race_is_not_taken_for_a_lack_of_memory(ours, monkeypatch):
    fail("racing", RuntimeError("cuDNN is not well"), monkeypatch)
    with pytest.raises(RuntimeError, match="not well"):
        run()


def test_a_step_of_jaxunet_without_memory_leaves_the_other_steps(ours, monkeypatch):
    def make(strategy, config, mode, *_):
        if mode == "train":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        return StepContestant(lambda: None, 0.0, None, 0.0, 1, None, None)

    monkeypatch.setattr(race, "make_step", make)
    found = run(("train", "predict"))[-1]
    assert found["out_of_memory"] == {"train": "RESOURCE_EXHAUSTED: Out of memory"}
    assert set(found["predict"]["pytorch"]) == {"channels_last", "compile", "eager"}


@pytest.fixture
def precision(monkeypatch):
    """TF32's settings as they were, afterwards."""
    before = jax.config.jax_default_matmul_precision
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "")
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    allowed = [backend.allow_tf32 for backend in backends]
    yield
    jax.config.update("jax_default_matmul_precision", before)
    for backend, value in zip(backends, allowed, strict=True):
        backend.allow_tf32 = value


@pytest.mark.parametrize(
    ("asked", "own", "holds"),
    [(True, None, True), (False, None, False), (True, "highest", False)],
)
def test_tf32_is_the_same_for_both(asked, own, holds, precision):
    jax.config.update("jax_default_matmul_precision", own)
    assert card.use_tf32(asked, pytorch=True) == holds
    assert torch.backends.cudnn.allow_tf32 == holds
    assert torch.backends.cuda.matmul.allow_tf32 == holds
    assert jax.config.jax_default_matmul_precision == (None if holds else "highest")


def test_the_card_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card.card() is None
    fake = tmp_path / "nvidia-smi"
    values = "NVIDIA H100 80GB HBM3, 580.159.04, 1755, 2619, 1980, 2619, 700.00, 41"
    fake.write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\necho '{values}'\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    found = card.card()
    assert found["name"] == "NVIDIA H100 80GB HBM3"
    assert (found["clocks.sm"], found["clocks.max.sm"]) == ("1755", "1980")
