"""Where the time of a training step goes: what the device ran, from a profile."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxunet.bench.program import KINDS, Operation, by_name
from jaxunet.bench.setting import Setting
from jaxunet.bench.steps import initial_state, make_step
from jaxunet.devices.strategies import make_strategy
from jaxunet.files import write_atomically, write_json

STEPS = 3
DEAREST = 30
_AROUND_OTHERS = ("call", "conditional", "while")
_PRODUCTS = re.compile(r"conv|prop|grad|gemm|cudnn")


def profile(setting: Setting, folder: Path) -> dict[str, Any]:
    """A profile of three training steps, and what it says: see `table`.

    Into `folder` go the trace, for Perfetto and TensorBoard, `kernels.json`, `kernels.txt`,
    and the optimised program, `train.hlo.txt`.
    """
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    config = setting.config
    state = initial_state(config)
    step = make_step(strategy, config, "train", state, config.train.batch_size)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # which would slow the steps down
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        step(STEPS)
    program = step.compiled.as_text()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found = {"setting": setting.record(), **table(newest, program, STEPS)}
    write_atomically(folder / "train.hlo.txt", program)
    write_json(folder / "kernels.json", found)
    write_atomically(folder / "kernels.txt", text(found))
    return found


def table(trace: Path, program: str, steps: int) -> dict[str, Any]:
    """What the first device ran, dearest first, and the share of each kind.

    Args:
        trace: an `.xplane.pb` of the profiler.
        program: the text of the optimised program that ran.
        steps: how many of them the trace holds.

    Returns:
        All of one step, in milliseconds: `wall_ms`; `busy_ms`, the sum over kernels (on a CPU
        over threads, so that it may be more); `by_kind`, with `ms` and `share` of what was
        busy; `kernels`, each with its kind, layer and pass.
    """
    operations = by_name(program)
    times: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    starts, ends = [], []
    for kernel, operation, start, duration in _events(trace):
        # A kernel of a command buffer is called as its operation, in a GPU's letters.
        name = operation if operation in operations else kernel
        if name in operations and operations[name].opcode in _AROUND_OTHERS:
            continue
        times[kernel, name] += duration
        counts[kernel, name] += 1
        starts.append(start)
        ends.append(start + duration)
    busy = sum(times.values())
    by_kind = dict.fromkeys(KINDS, 0.0)
    kernels = []
    for (kernel, name), nanoseconds in sorted(times.items(), key=lambda item: -item[1]):
        of = operations.get(name) or _nameless(kernel)
        by_kind[of.kind] += nanoseconds
        kernels.append(
            {
                "ms": nanoseconds / 1e6 / steps,
                "times": counts[kernel, name] / steps,
                "kind": of.kind,
                "layer": of.layer,
                "backward": of.backward,
                "operation": name,
                "kernel": kernel,
            }
        )
    return {
        "wall_ms": (max(ends) - min(starts)) / 1e6 / steps if ends else 0.0,
        "busy_ms": busy / 1e6 / steps,
        "by_kind": {
            kind: {"ms": ns / 1e6 / steps, "share": ns / busy if busy else 0.0}
            for kind, ns in by_kind.items()
        },
        "kernels": kernels,
    }


def text(found: dict[str, Any]) -> str:
    """`table`'s result to read."""
    if not found["kernels"]:
        return "The profiler recorded no kernel of the step.\n"
    lines = [
        "One training step, measured: "
        f"{found['wall_ms']:.3f} ms, of which busy {found['busy_ms']:.3f}",
        "",
    ]
    for kind, each in found["by_kind"].items():
        lines.append(f"{each['ms']:10.3f} ms {each['share']:6.1%}  {kind}")
    lines += ["", "        ms times  kind                layer and pass, operation, kernel"]
    for each in found["kernels"][:DEAREST]:
        way = "backward" if each["backward"] else "forward"
        where = f"{each['layer']} {way}" if each["layer"] else "-"
        name, kernel = each["operation"], each["kernel"]
        lines.append(
            f"{each['ms']:10.3f} {each['times']:5g}  {each['kind']:18}  {where}, {name}"
            + (f", {kernel[:90]}" if kernel != name else "")
        )
    return "\n".join(lines) + "\n"


def _events(trace: Path) -> Iterator[tuple[str, str, float, float]]:
    """Kernel, operation, start and duration in ns of all that the first device ran."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    device = next((p for p in planes if p.name.startswith("/device:")), None)
    for plane in planes if device is None else [device]:
        for line in plane.lines:
            # A GPU's other lines repeat what is in its streams; a CPU's are threads.
            if device is not None and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                with warnings.catch_warnings():  # a type of JAX's own has no module
                    warnings.simplefilter("ignore", DeprecationWarning)
                    stats = dict(event.stats)
                if device is not None or "hlo_op" in stats:
                    operation = str(stats.get("hlo_op", ""))
                    yield event.name, operation, event.start_ns, event.duration_ns


def _nameless(kernel: str) -> Operation:
    """What the program has no operation of that name for: a library's kernel, or the driver's
    copies."""
    kind = "convolution" if _PRODUCTS.search(kernel) else "copy and relayout"
    return Operation(kernel, kind, "", False, "")
