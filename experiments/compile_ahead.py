"""What steps cost on TPUs and GPUs that are not there:
`python experiments/compile_ahead.py [PRESET] --topology v5e:2x2`."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from command_line import Configured, parse, preset, run_script, take_preset

from jaxunet.bench.estimate import ESTIMATE, estimate, largest_batch, points_of, weak_scaling
from jaxunet.bench.estimate_figures import draw
from jaxunet.bench.estimate_tables import show
from jaxunet.bench.steps import MODES, Mode
from jaxunet.config import Config
from jaxunet.config_json import to_dict
from jaxunet.devices.ahead import Topology, absent, compile_only
from jaxunet.devices.environment import command_line, environment
from jaxunet.devices.strategies import check_divisible
from jaxunet.errors import ConfigError
from jaxunet.files import check_writable, write_json


@dataclass(frozen=True)
class Arguments(Configured):
    topology: tuple[str, ...] = ("v5e:2x2",)
    """TPU slices (v5e:2x2, v6e:4x4, v5p:2x2x1) or GPUs of a host (h100:1 to h100:8). With
    several, each chip computes as many images as on the first: train.batch-size is for that."""
    parallel: tuple[Literal["pmap", "jit"], ...] = ("pmap", "jit")
    """Strategies."""
    steps: tuple[Mode, ...] = MODES
    """Which steps to compile."""
    fit: bool = False
    """Also find the largest training batch a chip that fits its memory, by bisection (each try
    compiles), with and without model.remat."""
    hlo: Path | None = None
    """File for the optimised program of the first topology, strategy and step."""
    beside: Path | None = None
    """An earlier NAME.json, drawn beside."""
    out: Path = field(default_factory=lambda: Path("experiments/results"))
    """Folder for NAME.json and NAME.png."""
    name: str = "ahead"
    """Name of the two files."""


def settings(arguments: Arguments) -> list[tuple[Topology, Config]]:
    """Each topology with its global batch.

    Raises:
        ConfigError: there is no such topology, or it does not divide the batch.
    """
    if not (arguments.topology and arguments.parallel and arguments.steps):
        raise ConfigError("--topology, --parallel and --steps each take at least one value.")
    config, found = arguments.config, []
    topologies = [absent(name) for name in arguments.topology]
    first = len(topologies[0].devices)
    check_divisible("train.batch_size", config.train.batch_size, first)
    for topology in topologies:
        batch_size = config.train.batch_size // first * len(topology.devices)
        train = replace(config.train, batch_size=batch_size)
        found.append((topology, replace(config, train=train)))
    return found


def main() -> None:
    compile_only()
    name, rest = take_preset(sys.argv[1:])
    start = preset(name) if name else Config()
    default = Arguments(start.data, start.model, start.optimizer, start.train)
    arguments = parse(Arguments, "Estimate the cost of steps.", default, rest)
    check_writable(arguments.out, "--out")
    if arguments.hlo is not None:
        check_writable(arguments.hlo.parent, "--hlo")
    points = settings(arguments)
    result: dict[str, Any] = {
        "what": ESTIMATE,
        "points": [],
        "config": to_dict(arguments.config),
        "command": command_line(),
        **environment("libtpu", "jax-cuda13-plugin"),
    }
    if arguments.beside is not None:
        result["beside"] = points_of(arguments.beside)
    path = arguments.out / f"{arguments.name}.json"
    hlo, first = arguments.hlo, arguments.parallel[0]
    for topology, config in points:
        for parallel in arguments.parallel:
            print(f"Compiling for {topology.name}, {parallel} ({ESTIMATE})", flush=True)
            point = estimate(topology, config, parallel, arguments.steps, hlo)
            hlo = None
            result["points"].append(point)
            if len(points) > 1:
                result["weak_scaling"] = weak_scaling(
                    [p for p in result["points"] if p["setting"]["parallel"] == first]
                )
            write_json(path, result)  # after each: what is interrupted keeps the others
    if arguments.fit:
        result["largest_batch"] = []
        for topology, config in points:
            for remat in (False, True):
                other = replace(config, model=replace(config.model, remat=remat))
                print(
                    f"Looking for the largest batch on {topology.name}, remat {remat}",
                    flush=True,
                )
                found = largest_batch(topology, other, first)
                result["largest_batch"].append({"topology": topology.name, **found})
                write_json(path, result)
    draw(result, path.with_suffix(".png"))
    show(result)
    print(f"Written: {path} and {path.with_suffix('.png')} ({ESTIMATE})")


if __name__ == "__main__":
    run_script(main)
