import json
import time
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import run as run_script

from jaxunet.augmentation_config import STRENGTHS
from jaxunet.bench import measure, products, race, rounds, scaling, steps
from jaxunet.bench.flops import forward_flops, layers, train_flops
from jaxunet.bench.setting import Setting, Timing
from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.devices.strategies import make_strategy
from jaxunet.model import conv, winograd
from jaxunet.model.unet import make_unet


def test_flops_of_a_tiny_model_are_those_of_a_count_by_hand():
    """Width 2, two levels, 4 x 6 pixels: 24 at the top, 6 at the bottom."""
    model = ModelConfig(width=2, depth=2)
    found = {name: layer.flops for name, layer in layers(model, 4, 6).items()}
    assert found == {
        "decoder/level_0/conv_0": 2 * 9 * 4 * 2 * 24,
        "decoder/level_0/conv_1": 2 * 9 * 2 * 2 * 24,
        "decoder/level_0/up": 2 * 4 * 4 * 2 * 6,
        "encoder/level_0/conv_0": 2 * 9 * 3 * 2 * 24,
        "encoder/level_0/conv_1": 2 * 9 * 2 * 2 * 24,
        "encoder/level_1/conv_0": 2 * 9 * 2 * 4 * 6,
        "encoder/level_1/conv_1": 2 * 9 * 4 * 4 * 6,
        "head": 2 * 2 * 1 * 24,
    }
    first = 2 * 9 * 3 * 2 * 24
    assert train_flops(model, 4, 6) == 3 * sum(found.values()) - first


@pytest.mark.parametrize(
    ("config", "height", "columns"),
    [
        (ModelConfig(width=16, depth=4), 128, 128),
        (ModelConfig(width=16, depth=4), 100, 76),
        (
            ModelConfig(width=16, depth=4, skip="pad", upsampling="bilinear", num_logits=2),
            100,
            76,
        ),
    ],
)
def test_flops_are_xlas(config, height, columns, monkeypatch):
    for module, rule in ((winograd, "pays"), (conv, "_loops_can")):
        monkeypatch.setattr(module, rule, lambda *_: False)
    model = make_unet(config)
    key = jax.random.key(0)
    variables = jax.eval_shape(partial(model.init, key), jnp.zeros((1, 16, 16, 3)))
    images = jax.ShapeDtypeStruct((1, height, columns, 3), jnp.float32)
    analysis = jax.jit(model.apply).lower(variables, images).cost_analysis()
    # XLA leaves out the products with padding, up to 8% at the bottom of so small an image,
    # and counts biases, poolings and the like, about 1%.
    assert analysis["flops"] == pytest.approx(forward_flops(config, height, columns), rel=0.07)


def test_rounds_alternate_and_last_as_long_as_asked():
    calls = []

    def contestant(name, seconds):
        def run(steps):
            calls.append(name)
            time.sleep(steps * seconds)

        return run

    slow, fast = contestant("slow", 0.02), contestant("fast", 0.01)
    times = rounds.time_rounds({"slow": slow, "fast": fast}, 4, 0.06)
    assert calls[2:] == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert len(times["slow"]) == len(times["fast"]) == 4
    assert np.median(times["slow"]) == pytest.approx(0.02, rel=0.3)
    found = rounds.ratio(times["slow"], times["fast"])
    assert found["median"] == pytest.approx(2, rel=0.3)
    assert found["quartiles"][0] <= found["median"] <= found["quartiles"][1]


def test_a_description_follows_from_the_times():
    found = rounds.describe([0.5, 0.1, 0.2], images=8, flops=1e9)
    assert found["step_seconds"]["median"] == 0.2
    assert found["step_seconds"]["least"] == 0.1
    assert found["images_per_second"] == pytest.approx(40)
    assert found["flops_per_second"] == pytest.approx(5e9)


def test_the_exponent_of_a_power_law_is_found():
    sizes = [1, 2, 4, 8]
    assert rounds.exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)


def test_the_rate_of_matrix_products_is_that_of_numpy_within_reason():
    found = products.matmul_rate("float32", jax.devices()[0], seconds=0.05)
    x = np.ones((1024, 1024), np.float32)
    x @ x
    start = time.perf_counter()
    for _ in range(5):
        x @ x
    numpys = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    assert 0.1 < found["flops_per_second"] / numpys < 10


@pytest.mark.parametrize(
    ("mode", "cache"), [("train", True), ("eval", False), ("predict", False)]
)
def test_a_step_is_compiled_timed_and_counted(mode, cache):
    config = Config(
        data=DataConfig(image_size=16),
        model=ModelConfig(width=2, depth=2),
        train=TrainConfig(augment="none"),
    )
    strategy = make_strategy("jit", jax.devices()[:1])
    state = steps.initial_state(config)
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in settings]
    jax.config.update("jax_enable_compilation_cache", cache)
    events = []

    def listen(event: str, **_: object) -> None:
        events.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        found = steps.make_step(strategy, config, mode, state, 3)
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.config.update("jax_enable_compilation_cache", True)
    assert [getattr(jax.config, name) for name in settings] == before
    assert found.compile_seconds > 0
    if cache:  # loaded, not compiled again
        assert found.cached_compile_seconds > 0
        assert "/jax/compilation_cache/cache_hits" in events
    else:
        assert found.cached_compile_seconds is None
    assert found.program_bytes > 3 * 16 * 16 * 3
    assert (found.loss is not None) == (mode == "train")
    found(2)
    one = steps.step_flops(config, mode, 1)
    assert steps.step_flops(config, mode, 3) == 3 * one


def test_the_script_measures_against_pytorch_and_sweeps(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes minutes the first time
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # the user's own, which stays
    options = ("--model.width", 4, "--model.depth", 2, "--rounds", 2, "--seconds", 0.01)
    options += ("--data.image-size", 16, "--data.prepared-dir", tmp_path / "data")
    options += ("--out", tmp_path)
    measure = ("--against", "pytorch", "--measure", "train", "layers", "training")
    measure += ("--forms", "compile", "channels_last", "graphs", "eager", "--no-tf32")
    output = run_script("benchmark.py", *options, *measure, "--profile", tmp_path / "trace")
    assert "train step over PyTorch's best" in output
    found = json.loads((tmp_path / "benchmark.json").read_text())
    (point,) = found["points"]
    entry = point["train"]
    assert list(entry["pytorch"]) == ["compile", "channels_last", "eager"]
    assert entry["pytorch_unavailable"] == {"graphs": "CUDA graphs are a GPU's"}
    over = {f: v["jaxunet_over_it"]["median"] for f, v in entry["pytorch"].items()}
    assert entry["pytorch_best"] == max(over, key=over.get)
    assert entry["jaxunet"]["step_seconds"]["rounds"] == 2 * 4
    assert found["flags"]["tf32"] is False
    assert found["flags"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert entry["ratio_to_pytorch"]["rounds"] == 2
    assert entry["jaxunet"]["share_of_matmul_rate"] > 0
    losses = list(point["train"]["first_loss"].values())
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert set(point["training"]) == {"none", "host", "device"}
    assert "End to end, seconds of all rounds" in output
    for cached in point["training"].values():
        spent = cached["time"]["seconds"]
        assert spent.keys() <= {"start", "compilation", "data", "steps"}
        assert min(spent["start"], spent["steps"]) > 0
        assert sum(spent.values()) == pytest.approx(cached["time"]["total_seconds"], abs=0.01)
    # The others have the program that this one or the step alone compiled.
    assert point["training"]["device"]["time"]["seconds"]["compilation"] > 0
    assert found["versions"]["torch"]
    layers = point["layers"]
    assert sum(len(entry["layers"]) for entry in layers) == 6
    batch = point["setting"]["batch_size"]
    assert [batch, 16, 16, 8, 4] in [entry["shape"] for entry in layers]
    lanes = found["cpu_loops"]
    assert (f"loops of {lanes} lanes" if isinstance(lanes, int) else "no loops: ") in output
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    assert list((tmp_path / "trace").rglob("perfetto_trace.json.gz"))
    kernels = json.loads((tmp_path / "trace" / "kernels.json").read_text())
    assert (tmp_path / "trace" / "kernels.txt").read_text() in output
    assert sum(each["share"] for each in kernels["by_kind"].values()) == pytest.approx(1)
    assert sum(each["ms"] for each in kernels["kernels"]) == pytest.approx(kernels["busy_ms"])
    layers = {(e["layer"], e["backward"]) for e in kernels["kernels"] if e["ms"] > 0}
    assert {("encoder/level_0/conv_0", False), ("decoder/level_0/conv_1", True)} <= layers

    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    sweep = ("--sweep.batch-size", 1, 2, 4, "--name", "sweep")
    sweep += ("--measure", "train", "preparation", "--sweep.dtype", "float32")
    output = run_script("benchmark.py", "nvidia", *options, *sweep)
    assert "theirs is not padded" in output
    assert "(published)" not in output  # which is of another size
    assert "Step time grows with batch_size to the power" in output
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [p["setting"]["batch_size"] for p in found["points"]] == [1, 2, 4]
    assert found["neighbour"]["images_per_second"] == {"bfloat16": 141, "float32": 63}
    assert not any("neighbour_images_per_second" in point for point in found["points"])
    assert set(found["preparation"]) == {"full_decode", "one_core", "all_cores"}
    assert 0.2 < found["fits"]["batch_size"]["memory_exponent"] < 1.2
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_the_share_of_linear_scaling_is_one_devices_time_over_that_of_all(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    pauses = {1: 0.012, 2: 0.016}  # by number of devices

    def make_step(strategy, config, mode, state, batch_size):
        count = len(strategy.devices)
        assert (mode, batch_size) == ("train", 3 * count)
        assert config.train.batch_size == batch_size
        assert list(strategy.devices) == jax.devices()[:count]

        def step():
            clock.now += pauses[count]

        return steps.StepContestant(step, 1.0, None, 1.0, None, None, None)

    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    for module in (race, scaling):
        monkeypatch.setattr(module, "make_step", make_step)
    state = SimpleNamespace(params={"a": np.zeros((500, 1000), np.float32)})
    monkeypatch.setattr(race, "initial_state", lambda config: state)
    timing = Timing(measure=("train",), rounds=3, seconds=0.05)

    def measured(devices):
        config, point = Config(train=TrainConfig(batch_size=3 * devices)), {}
        race.measure_steps(Setting(config, "jit", devices), timing, 1.0, point, lambda: None)
        return point

    assert "scaling" not in measured(1)
    found = measured(2)["scaling"]
    assert found["share"]["median"] == pytest.approx(0.012 / 0.016)
    rates = [found[name]["images_per_second"] for name in ("all_devices", "one_device")]
    assert rates == pytest.approx([6 / 0.016, 3 / 0.012])
    assert rates[0] / (2 * rates[1]) == pytest.approx(found["share"]["median"])
    assert found["gradient_bytes"] == 2_000_000


def test_a_line_says_what_limits_the_scaling():
    def seconds(median):
        return {"step_seconds": {"median": median}}

    point = {
        "scaling": {
            "devices": 4,
            "share": {"median": 0.75},
            "one_device": seconds(0.012),
            "all_devices": seconds(0.016),
            "gradient_bytes": 2_000_000,
        }
    }
    assert scaling.limit(point) == (
        "On 4 devices 75% of linear scaling: a step takes 16.00 ms, one device's part by "
        "itself 12.00. The rest is summing 2 MB of gradients and waiting for one another; "
        "what feeding them costs was not measured."
    )
    for slowest, said in (
        (1.5, "50%: feeding limits it, by 8.00 ms"),
        (1.2, "62%: summing 2 MB of gradients and waiting for one another limits it, by 4.00"),
    ):
        ratios = {"none": 3.0, "host": slowest}
        point["training"] = {k: {"ratio_to_step": {"median": v}} for k, v in ratios.items()}
        assert f"End to end (cache host) it is {said}" in scaling.limit(point)


def test_each_strength_of_augmentation_is_timed_in_turn_with_the_step(monkeypatch):
    pauses = {"none": 0.02, "flip": 0.002, "standard": 0.006, "strong": 0.01}
    names = {ranges: name for name, ranges in STRENGTHS.items()}

    class Sleeping:
        def compile(self, vary, outputs):
            (recipe,) = vary.args
            return lambda step, batch: time.sleep(pauses[names[recipe.augment]])

        def split(self, batch):
            return batch

        replicate = split

    def make_step(strategy, config, mode, state, batch_size):
        assert (mode, batch_size) == ("train", 4)
        return lambda steps: time.sleep(steps * pauses[config.train.augment])

    monkeypatch.setattr(measure, "make_strategy", lambda *_: Sleeping())
    monkeypatch.setattr(measure, "make_step", make_step)
    monkeypatch.setattr(measure, "initial_state", lambda config: None)
    setting = Setting(Config(train=TrainConfig(batch_size=4)), "jit", 1)
    found = measure.measure_augmentation(setting, Timing(rounds=5, seconds=0.01))
    assert list(found) == ["step", "flip", "standard", "strong"]
    ratios = [each["ratio_to_step"]["median"] for each in found.values()]
    assert ratios[1] < ratios[2] < ratios[3] < ratios[0] == 1
    assert found["strong"]["images_per_second"] <= 4 / 0.01


def test_what_has_no_pytorch_side_is_refused_before_anything_is_measured(tmp_path):
    words = ("--against", "pytorch", "--model.norm", "batch", "--out", tmp_path)
    assert "Only the reference design" in run_script("benchmark.py", *words, expect=1)
    assert not list(tmp_path.iterdir())


def test_a_benchmark_of_no_rounds_is_refused(tmp_path):
    words = ("--rounds", 0, "--out", tmp_path)
    assert "--rounds is 0, but at least 1" in run_script("benchmark.py", *words, expect=1)


def test_a_schedule_that_outlasts_a_step_is_measured():
    """Of a cosine with warm-up, where a run of one step would be refused."""
    config = Config(
        data=DataConfig(image_size=16),
        model=ModelConfig(width=2, depth=2),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=5, learning_rate=1e-3),
        train=TrainConfig(augment="none"),
    )
    strategy = make_strategy("jit", jax.devices()[:1])
    step, arguments = steps._step_and_arguments(
        strategy, config, "train", steps.initial_state(config), 2
    )
    _, metrics = step(*arguments)
    assert np.isfinite(strategy.fetch(metrics)["loss"])
