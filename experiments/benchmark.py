"""Step throughput: `python experiments/benchmark.py [nvidia] [--against pytorch]`.

`nvidia` stands for the setting nearest to that of NVIDIA's published U-Net, whose figures for
an A100 are shown beside.
"""

import itertools
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import jax
from command_line import Configured, parse, run_script

from jaxunet.bench.card import card, cudnn_version, share_memory, use_tf32
from jaxunet.bench.exported import config_of, measure_exported
from jaxunet.bench.feeding import make_preparation
from jaxunet.bench.figures import draw
from jaxunet.bench.kernels import profile, text
from jaxunet.bench.measure import fits, measure_augmentation, measure_layers, measure_loops
from jaxunet.bench.neighbours import NEIGHBOURS, Neighbour
from jaxunet.bench.products import matmul_rate
from jaxunet.bench.race import measure_steps
from jaxunet.bench.rounds import describe, time_rounds
from jaxunet.bench.setting import Setting, Timing
from jaxunet.bench.tables import show, title
from jaxunet.config import DataConfig, ModelConfig, TrainConfig
from jaxunet.config_json import to_dict
from jaxunet.devices import tuning
from jaxunet.devices.environment import command_line, environment
from jaxunet.devices.strategies import check_divisible
from jaxunet.errors import ConfigError
from jaxunet.files import check_writable, write_json
from jaxunet.model import cpu

VARIABLES = (
    *("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "NVIDIA_TF32_OVERRIDE"),
    *("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", cpu.SWITCH),
)


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
class Arguments(tuning.Tuning, Timing, Configured):
    sweep: Sweep = field(default_factory=Sweep)
    parallel: Literal["pmap", "jit"] = "pmap"
    """How steps are spread over devices."""
    exported: tuple[Path, ...] = ()
    """Files of experiments/export.py to time, each beside our predict step for its model."""
    profile: Path | None = None
    """Also write into this folder a trace of three training steps, for Perfetto and
    TensorBoard, and a table of their dearest kernels by layer and kind."""
    out: Path = field(default_factory=lambda: Path("experiments/results"))
    """Folder for NAME.json and NAME.png."""
    name: str = "benchmark"
    """Name of the two files."""


def settings(arguments: Arguments) -> list[Setting]:
    """Every combination of the sweep.

    Raises:
        ConfigError: one of them can't be.
    """
    base, sweep, count = arguments.config, arguments.sweep, jax.device_count()
    if base.parts_per_step > 1:
        raise ConfigError(
            "The benchmark times one batch: leave optimizer.accumulate_steps and "
            "train.microbatch alone."
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
            train=replace(base.train, batch_size=batch_size),
        )
        found.append(Setting(config, parallel, devices))
    if jax.devices()[0].platform == "cpu" and count > 1:
        raise ConfigError(
            "The CPU's simulated devices share its cores, so their times are no speed. "
            "Benchmark one (leave xla_force_host_platform_device_count out of XLA_FLAGS); "
            "tests/devices/test_parallel.py shows that several compute the same."
        )
    return found


def read_arguments(words: list[str]) -> tuple[Arguments, Neighbour | None]:
    """The options, and whom they start from if the first of `words` says so.

    Raises:
        ConfigError: there is no such neighbour.
    """
    described = "Measure step throughput. Before the options: nvidia, for the setting nearest "
    described += "to that of NVIDIA's published U-Net, and its figures beside ours."
    if not words or words[0].startswith("-"):
        default = Arguments(
            data=DataConfig(image_size=128, synthetic_train=64, synthetic_validation=8),
            model=ModelConfig(width=16),
            train=TrainConfig(batch_size=4, eval_batch_size=4, augment="none"),
        )
        return parse(Arguments, described, default, words), None
    if words[0] not in NEIGHBOURS:
        raise ConfigError(
            f"The benchmark has no preset {words[0]!r}, but {', '.join(NEIGHBOURS)}; all else "
            "is said by options, as --model.width."
        )
    make, neighbour = NEIGHBOURS[words[0]]
    config = make()
    default = Arguments(
        data=config.data,
        model=config.model,
        train=config.train,
        measure=("train",),
        sweep=Sweep(dtype=("bfloat16", "float32")),
    )
    return parse(Arguments, described, default, words[1:]), neighbour


def main() -> None:
    arguments, neighbour = read_arguments(sys.argv[1:])
    tuning.use(arguments)
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds is {arguments.rounds}, but at least 1 must be timed.")
    check_writable(arguments.out, "--out")
    if arguments.profile is not None:
        check_writable(arguments.profile, "--profile")
    against = ["torch"] if arguments.against == "pytorch" else []
    if against:
        share_memory()
    tf32 = use_tf32(arguments.tf32, pytorch=bool(against))
    points = settings(arguments)
    if against:  # before any long work starts
        from jaxunet.bench.pytorch import check_followed
        from jaxunet.interop.pytorch_encoders import make_pytorch_model

        make_pytorch_model(replace(arguments.model, dtype="float32", remat=False))
        check_followed(arguments.config)
    files = {path: config_of(arguments.config, path) for path in arguments.exported}
    dtypes = sorted({point.config.model.dtype for point in points})
    seconds = min(0.3, arguments.seconds)
    rates = {dtype: matmul_rate(dtype, jax.devices()[0], seconds) for dtype in dtypes}
    result: dict[str, Any] = {
        "points": [],
        "matmul_rate": rates,
        "config": to_dict(arguments.config),
        "command": command_line(),
        "flags": {
            **{name: os.environ.get(name, "") for name in VARIABLES},
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "tf32": tf32,
        },
        "card": card(),
        "cudnn": cudnn_version(),
        **environment(*against),
    }
    if neighbour is not None:
        result["neighbour"] = neighbour.record()
    if "preparation" in arguments.measure:
        makers = make_preparation()
        times = time_rounds(makers, arguments.rounds, arguments.seconds)
        result["preparation"] = {name: describe(times[name], 1) for name in makers}
    path = arguments.out / f"{arguments.name}.json"
    loops = {"pipeline", "training"} & set(arguments.measure)

    def save() -> None:
        """After each contestant: what is cut keeps the others."""
        result["fits"] = fits(result["points"])
        write_json(path, result)

    for number, setting in enumerate(points, 1):
        print(f"Measuring {number} of {len(points)}: {setting.record()}", flush=True)
        rate = rates[setting.config.model.dtype]["flops_per_second"]
        point: dict[str, Any] = {"setting": setting.record()}
        if neighbour is not None and (theirs := neighbour.beside(setting)):
            point["neighbour_images_per_second"] = theirs
        result["points"].append(point)
        measure_steps(setting, arguments, rate, point, save)
        if "augmentation" in arguments.measure:
            point["augmentation"] = measure_augmentation(setting, arguments)
        if loops:
            point |= measure_loops(setting, arguments)
        if "layers" in arguments.measure:
            point["layers"] = measure_layers(setting, arguments)
        point["card"] = card()  # its clocks and temperature while it is warm
        save()
    for file, config in files.items():
        print(f"Measuring {file}", flush=True)
        setting = Setting(config, arguments.parallel, jax.device_count())
        result.setdefault("exported", []).append(measure_exported(file, setting, arguments))
        save()
    draw(result, path.with_suffix(".png"), title(result))
    show(result)
    print(f"Written: {path} and {path.with_suffix('.png')}")
    if arguments.profile is not None:
        print(text(profile(points[0], arguments.profile)))
        print(f"Trace:   {arguments.profile}, for https://ui.perfetto.dev or TensorBoard")


if __name__ == "__main__":
    run_script(main)
