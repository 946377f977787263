"""Step throughput: `python experiments/benchmark.py [--against pytorch]`."""

import itertools
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import jax
from command_line import parse, run_script
from rich.console import Console
from rich.table import Table

from jaxunet.bench import benchmark
from jaxunet.bench.benchmark import Contestant, describe, ratio, time_rounds
from jaxunet.bench.figures import scaling, throughput
from jaxunet.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxunet.config_json import to_dict
from jaxunet.data import prepare
from jaxunet.devices.environment import command_line, environment
from jaxunet.devices.strategies import check_divisible, make_strategy
from jaxunet.errors import ConfigError
from jaxunet.files import check_writable, write_json
from jaxunet.model import cpu

Measure = Literal["train", "eval", "predict", "pipeline", "training", "preparation", "layers"]
VARIABLES = ("XLA_FLAGS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", cpu.SWITCH)
CACHES: tuple[Literal["none", "host", "device"], ...] = ("none", "host", "device")


@dataclass(frozen=True)
class Sweep:
    """Values to measure one after the other; with several fields, every combination."""

    batch_size: tuple[int, ...] = ()
    """Global batch sizes."""
    image_size: tuple[int, ...] = ()
    """Sides in pixels."""
    width: tuple[int, ...] = ()
    """Channels at the first level."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Compute types."""
    remat: tuple[bool, ...] = ()
    """Without and with recomputation of activations."""
    parallel: tuple[Literal["pmap", "jit"], ...] = ()
    """Strategies."""
    devices: tuple[int, ...] = ()
    """Numbers of devices (the batch size stays that of all together)."""


@dataclass(frozen=True)
class Arguments(Config):
    sweep: Sweep = field(default_factory=Sweep)
    measure: tuple[Measure, ...] = ("train", "eval", "predict", "pipeline", "training")
    """What to time: three kinds of step on a batch that lies on the devices; the input
    `pipeline` alone; `training` end to end, under each --data.cache; `preparation` of data:
    decoding and resizing of large JPEGs; `layers`: every 3x3 convolution and its gradients."""
    against: Literal["nothing", "pytorch"] = "nothing"
    """Time PyTorch's steps too, in turn with jaxunet's."""
    rounds: int = 12
    """Timed rounds of each contestant."""
    seconds: float = 1.0
    """Length of a round."""
    parallel: Literal["pmap", "jit"] = "pmap"
    """How steps are spread over devices."""
    profile: Path | None = None
    """Also write a trace of three training steps into this folder, for Perfetto and
    TensorBoard."""
    out: Path = field(default_factory=lambda: Path("experiments/results"))
    """Folder for NAME.json and NAME.png."""
    name: str = "benchmark"
    """Name of the two files."""

    @property
    def config(self) -> Config:
        return Config(self.data, self.model, self.optimizer, self.train)


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    config: Config
    parallel: Literal["pmap", "jit"]
    devices: int

    def record(self) -> dict[str, Any]:
        return {
            "batch_size": self.config.train.batch_size,
            "image_size": self.config.data.image_size,
            "width": self.config.model.width,
            "dtype": self.config.model.dtype,
            "remat": self.config.model.remat,
            "parallel": self.parallel,
            "devices": self.devices,
        }


def settings(arguments: Arguments) -> list[Setting]:
    """Every combination of the sweep.

    Raises:
        ConfigError: one of them can't be.
    """
    base, sweep, count = arguments.config, arguments.sweep, jax.device_count()
    if base.optimizer.accumulate_steps > 1:
        raise ConfigError(
            "The benchmark times one batch: leave optimizer.accumulate_steps at 1."
        )
    found = []
    for batch_size, image_size, width, dtype, remat, parallel, devices in itertools.product(
        sweep.batch_size or (base.train.batch_size,),
        sweep.image_size or (base.data.image_size,),
        sweep.width or (base.model.width,),
        sweep.dtype or (base.model.dtype,),
        sweep.remat or (base.model.remat,),
        sweep.parallel or (arguments.parallel,),
        sweep.devices or (count,),
    ):
        if not 0 < devices <= count:
            raise ConfigError(f"sweep.devices has {devices}, but there are {count} devices.")
        check_divisible("train.batch_size", batch_size, devices)
        config = replace(
            base,
            data=replace(base.data, image_size=image_size),
            model=replace(base.model, width=width, dtype=dtype, remat=remat),
            train=replace(base.train, batch_size=batch_size, eval_batch_size=batch_size),
        )
        found.append(Setting(config, parallel, devices))
    if jax.devices()[0].platform == "cpu" and count > 1:
        raise ConfigError(
            "The CPU's simulated devices share its cores, so their times are no speed. "
            "Benchmark one (leave xla_force_host_platform_device_count out of XLA_FLAGS); "
            "tests/devices/test_parallel.py shows that several compute the same."
        )
    return found


def measure_steps(setting: Setting, arguments: Arguments, rate: float) -> dict[str, Any]:
    """Train, eval and predict steps, each with PyTorch's in turn."""
    config = setting.config
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    state = benchmark.initial_state(config)
    batch_size = config.train.batch_size
    result: dict[str, Any] = {}
    for mode in benchmark.MODES:
        if mode not in arguments.measure:
            continue
        ours = benchmark.make_step(strategy, config, mode, state, batch_size)
        contestants: dict[str, Contestant] = {"jaxunet": ours}
        theirs: dict[str, Any] = {}
        unavailable: dict[str, str] = {}
        if arguments.against == "pytorch":
            from jaxunet.bench.pytorch import make_pytorch_steps

            theirs, unavailable = make_pytorch_steps(config, mode, state, batch_size)
            contestants.update({f"pytorch_{form}": run for form, run in theirs.items()})
        times = time_rounds(contestants, arguments.rounds, arguments.seconds)
        flops = benchmark.step_flops(config, mode, batch_size)
        found = describe(times["jaxunet"], batch_size, flops)
        found["share_of_matmul_rate"] = found["flops_per_second"] / (rate * setting.devices)
        found["compile_seconds"] = ours.compile_seconds
        found["cached_compile_seconds"] = ours.cached_compile_seconds
        found["warm_up_seconds"] = ours.warm_up_seconds
        found["program_bytes"] = ours.program_bytes
        entry: dict[str, Any] = {"jaxunet": found}
        if theirs:
            entry["pytorch"] = {
                form: {
                    **describe(times[f"pytorch_{form}"], batch_size, flops),
                    "warm_up_seconds": run.warm_up_seconds,
                }
                for form, run in theirs.items()
            }
            best = min(theirs, key=lambda f: entry["pytorch"][f]["step_seconds"]["median"])
            entry["pytorch_best"] = best
            entry["pytorch_unavailable"] = unavailable
            entry["ratio_to_pytorch"] = ratio(times["jaxunet"], times[f"pytorch_{best}"])
            if ours.loss is not None:
                entry["first_loss"] = {
                    "jaxunet": ours.loss,
                    **{form: run.loss for form, run in theirs.items()},
                }
        entry["memory"] = benchmark.peak_memory(jax.devices()[0])
        result[mode] = entry
    return result


def measure_layers(setting: Setting, arguments: Arguments) -> list[dict[str, Any]]:
    """Each shape of 3x3 convolution: the product and its gradients, beside PyTorch's."""
    config = setting.config
    dtype, batch_size = config.model.dtype, config.train.batch_size
    found = []
    for shape, layers in benchmark.convolutions(config, batch_size).items():
        entry: dict[str, Any] = {"shape": list(shape), "layers": layers}
        ours = benchmark.make_products(shape, dtype)
        theirs: dict[str, Contestant] = {}
        if arguments.against == "pytorch":
            from jaxunet.bench.pytorch import make_pytorch_products

            theirs = make_pytorch_products(shape, dtype)
        for product, run in ours.items():
            contestants = {"jaxunet": run}
            if theirs:
                contestants["pytorch"] = theirs[product]
            times = time_rounds(contestants, arguments.rounds, arguments.seconds / 10)
            entry[product] = {name: benchmark.spread(t) for name, t in times.items()}
            if theirs:
                entry[product]["ratio"] = ratio(times["jaxunet"], times["pytorch"])
        found.append(entry)
    return found


def measure_loops(setting: Setting, arguments: Arguments) -> dict[str, Any]:
    """The pipeline alone and training end to end, each cache in turn with the step alone."""
    config, batch_size = setting.config, setting.config.train.batch_size
    data = prepare(config.data)
    source = data.source(config.data.train_split)
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    result: dict[str, Any] = {"examples": len(source)}
    if "pipeline" in arguments.measure:
        run = benchmark.make_pipeline(strategy, config, source)
        times = time_rounds({"pipeline": run}, arguments.rounds, arguments.seconds)
        result["pipeline"] = describe(times["pipeline"], batch_size)
    if "training" in arguments.measure:
        state = benchmark.initial_state(config)
        contestants: dict[str, Contestant] = {
            "step": benchmark.make_step(strategy, config, "train", state, batch_size)
        }
        for cache in CACHES:
            cached = replace(config, data=replace(config.data, cache=cache))
            contestants[cache] = benchmark.make_training(strategy, cached, source, state)
        times = time_rounds(contestants, arguments.rounds, arguments.seconds)
        result["step"] = describe(times["step"], batch_size)
        result["training"] = {
            cache: {
                **describe(times[cache], batch_size),
                "ratio_to_step": ratio(times[cache], times["step"]),
            }
            for cache in CACHES
        }
    return result


def fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The powers of batch size, image size and width that time and memory grow with."""
    found = {}
    for axis in ("batch_size", "image_size", "width"):
        others = [{k: v for k, v in p["setting"].items() if k != axis} for p in points]
        same = [p for p, rest in zip(points, others, strict=True) if rest == others[-1]]
        sizes = [p["setting"][axis] for p in same]
        if len(set(sizes)) < 3 or not all("train" in p for p in same):
            continue
        ours = [p["train"]["jaxunet"] for p in same]
        found[axis] = {
            "values": sizes,
            "step_time_exponent": benchmark.exponent(
                sizes, [o["step_seconds"]["median"] for o in ours]
            ),
        }
        if all(o["program_bytes"] for o in ours):
            found[axis]["memory_exponent"] = benchmark.exponent(
                sizes, [o["program_bytes"] for o in ours]
            )
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Cost against size, if the sweep has only that; else a bar for every time."""
    points = result["points"]
    for axis, fit in result["fits"].items():
        if "memory_exponent" in fit and len(fit["values"]) == len(points):
            scaling(points, axis, path, title(result))
            return
    throughput(points, path, title(result))


def show(result: dict[str, Any]) -> None:
    """A table of every time, and what it is compared with."""
    table = Table(title=title(result), title_justify="left")
    for column in ("", "ms a step", "quartiles", "images/s", "GFLOP/s", "of matmul"):
        table.add_column(column, justify="right" if column else "left")
    for point in result["points"]:
        setting = point["setting"]
        table.add_section()
        table.add_row(
            f"[bold]width {setting['width']}, {setting['image_size']} px, batch "
            f"{setting['batch_size']}, {setting['dtype']}"
            + (", remat" if setting["remat"] else "")
            + f", {setting['parallel']}"
        )
        for mode in benchmark.MODES:
            if mode not in point:
                continue
            entry = point[mode]
            row(table, f"{mode} step, jaxunet", entry["jaxunet"])
            for form, found in entry.get("pytorch", {}).items():
                row(table, f"{mode} step, PyTorch {form}", found)
            for form, reason in entry.get("pytorch_unavailable", {}).items():
                table.add_row(f"{mode} step, PyTorch {form}", "", f"not run: {reason[:40]}")
            if "ratio_to_pytorch" in entry:
                best = entry["pytorch_best"]
                low, high = entry["ratio_to_pytorch"]["quartiles"]
                table.add_row(
                    f"{mode} step over PyTorch's best ({best})",
                    f"[bold]{entry['ratio_to_pytorch']['median']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                )
        if "pipeline" in point:
            row(table, "input pipeline alone", point["pipeline"])
        for cache, found in point.get("training", {}).items():
            over = found["ratio_to_step"]["median"]
            row(table, f"training, cache {cache}: {over:.3f} of the step", found)
    if "preparation" in result:
        table.add_section()
        for name, found in result["preparation"].items():
            row(table, f"decode and resize a 6-megapixel JPEG, {name.replace('_', ' ')}", found)
    Console(width=max(110, Console().width)).print(table)
    for point in result["points"]:
        if "layers" in point:
            show_layers(point["layers"])
    for axis, fit in result["fits"].items():
        memory = fit.get("memory_exponent")
        print(
            f"Step time grows with {axis} to the power {fit['step_time_exponent']:.2f}"
            + (f", memory {memory:.2f}" if memory else "")
        )


PRODUCTS = ("forward", "input_gradient", "kernel_gradient")


def show_layers(layers: list[dict[str, Any]]) -> None:
    """A table of every convolution: milliseconds, and over PyTorch's where it was timed."""
    table = Table(title="3x3 convolutions, ms (over PyTorch)", title_justify="left")
    for column in ("batch, rows, columns, in, out", "layers", *PRODUCTS):
        table.add_column(column.replace("_", " "), justify="right")
    for entry in layers:
        cells = []
        for product in PRODUCTS:
            found = entry[product]
            over = f" ({found['ratio']['median']:.2f})" if "ratio" in found else ""
            cells.append(f"{1e3 * found['jaxunet']['median']:.2f}{over}")
        table.add_row(", ".join(map(str, entry["shape"])), str(len(entry["layers"])), *cells)
    Console(width=max(110, Console().width)).print(table)


def title(result: dict[str, Any]) -> str:
    versions, devices = result["versions"], result["devices"]
    where, loops = devices["kind"], ""
    if devices["platform"] == "cpu":
        where = f"{result['host']['cpu']}, {result['host']['cores']} cores"
        lanes = result["cpu_loops"]
        loops = f"loops of {lanes} lanes" if isinstance(lanes, int) else f"no loops: {lanes}"
    names = [f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions]
    return f"{where}; {', '.join(names)}" + (f"; {loops}" if loops else "")


def row(table: Table, name: str, found: dict[str, Any]) -> None:
    seconds = found["step_seconds"]
    low, high = (1e3 * x for x in seconds["quartiles"])
    flops = found.get("flops_per_second")
    share = found.get("share_of_matmul_rate")
    table.add_row(
        name,
        f"{1e3 * seconds['median']:.1f}",
        f"{low:.1f} to {high:.1f}",
        f"{found['images_per_second']:.1f}",
        f"{flops / 1e9:.0f}" if flops else "",
        f"{share:.0%}" if share else "",
    )


def write_trace(setting: Setting, folder: Path) -> None:
    """A profile of three training steps."""
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    state = benchmark.initial_state(setting.config)
    step = benchmark.make_step(
        strategy, setting.config, "train", state, setting.config.train.batch_size
    )
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        step(3)


def main() -> None:
    default = Arguments(
        data=DataConfig(image_size=128, synthetic_train=64, synthetic_validation=8),
        model=ModelConfig(width=16),
        train=TrainConfig(batch_size=4, eval_batch_size=4, augment="none"),
    )
    arguments = parse(Arguments, "Measure step throughput.", default)
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds is {arguments.rounds}, but at least 1 must be timed.")
    check_writable(arguments.out, "--out")
    if arguments.profile is not None:
        check_writable(arguments.profile, "--profile")
    points = settings(arguments)
    against = ["torch"] if arguments.against == "pytorch" else []
    if against:  # before any long work starts
        from jaxunet.interop.pytorch_unet import make_pytorch_unet

        plain = benchmark.with_model(arguments.config, dtype="float32", remat=False)
        make_pytorch_unet(plain.model)
    dtypes = sorted({point.config.model.dtype for point in points})
    rates = {dtype: benchmark.matmul_rate(dtype, jax.devices()[0]) for dtype in dtypes}
    result: dict[str, Any] = {
        "points": [],
        "matmul_rate": rates,
        "config": to_dict(arguments.config),
        "command": command_line(),
        "flags": {
            **{name: os.environ.get(name, "") for name in VARIABLES},
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
        },
        **environment(*against),
    }
    if "preparation" in arguments.measure:
        makers = benchmark.make_preparation()
        times = time_rounds(makers, arguments.rounds, arguments.seconds)
        result["preparation"] = {name: describe(times[name], 1) for name in makers}
    path = arguments.out / f"{arguments.name}.json"
    loops = {"pipeline", "training"} & set(arguments.measure)
    for number, setting in enumerate(points, 1):
        print(f"Measuring {number} of {len(points)}: {setting.record()}", flush=True)
        rate = rates[setting.config.model.dtype]["flops_per_second"]
        point: dict[str, Any] = {"setting": setting.record()}
        point |= measure_steps(setting, arguments, rate)
        if loops:
            point |= measure_loops(setting, arguments)
        if "layers" in arguments.measure:
            point["layers"] = measure_layers(setting, arguments)
        result["points"].append(point)
        result["fits"] = fits(result["points"])
        write_json(path, result)  # after each point: an interrupted sweep keeps the others
    draw(result, path.with_suffix(".png"))
    show(result)
    print(f"Written: {path} and {path.with_suffix('.png')}")
    if arguments.profile is not None:
        write_trace(points[0], arguments.profile)
        print(f"Trace:   {arguments.profile}, for https://ui.perfetto.dev or TensorBoard")


if __name__ == "__main__":
    run_script(main)
