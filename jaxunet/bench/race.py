"""jaxunet's steps, and each form of PyTorch in turn with them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxunet.bench.rounds import describe, ratio, time_rounds
from jaxunet.bench.scaling import measure_scaling
from jaxunet.bench.setting import Setting, Timing
from jaxunet.bench.steps import (
    MODES,
    Mode,
    StepContestant,
    initial_state,
    make_step,
    step_flops,
)
from jaxunet.devices.memory import peak_memory
from jaxunet.devices.strategies import Strategy, make_strategy


def measure_steps(
    setting: Setting,
    timing: Timing,
    rate: float,
    point: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Train, eval and predict steps, each with PyTorch's in turn, into `point`; of several
    devices the train step with one's, too.

    `save` is called after each contestant, so that what was measured stays when a later one
    fails or the process is cut. Of a step that the devices have too little memory for, the
    reason is in `point["out_of_memory"]`.

    Args:
        rate: of matrix products, operations a second of one device.
    """
    strategy = make_strategy(setting.parallel, jax.devices()[: setting.devices])
    state = initial_state(setting.config)
    for mode in MODES:
        if mode not in timing.measure:
            continue
        with _noting_lack_of_memory(mode, point, save):
            _measure(mode, strategy, state, setting, timing, rate, point, save)


@contextmanager
def _noting_lack_of_memory(
    what: str, point: dict[str, Any], save: Callable[[], None]
) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        point.setdefault("out_of_memory", {})[what] = str(error).splitlines()[0][:200]
        save()


def _measure(
    mode: Mode,
    strategy: Strategy,
    state: Any,
    setting: Setting,
    timing: Timing,
    rate: float,
    point: dict[str, Any],
    save: Callable[[], None],
) -> None:
    config, batch_size = setting.config, setting.config.train.batch_size
    flops = step_flops(config, mode, batch_size)
    peak_rate = rate * setting.devices
    ours = make_step(strategy, config, mode, state, batch_size)
    times = time_rounds({"jaxunet": ours}, timing.rounds, timing.seconds)["jaxunet"]
    entry = point[mode] = {
        "jaxunet": _describe(ours, times, batch_size, flops, peak_rate),
        "memory": peak_memory(strategy.devices),
    }
    if ours.loss is not None:
        entry["first_loss"] = {"jaxunet": ours.loss}
    save()
    if mode == "train" and setting.devices > 1:
        with _noting_lack_of_memory("scaling", point, save):
            point["scaling"] = measure_scaling(setting, timing, ours, state)
            save()
    if timing.against == "nothing":
        return
    from jaxunet.bench.pytorch import PytorchContestant, with_form

    theirs: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    entry |= {"pytorch": theirs, "pytorch_unavailable": unavailable}
    for form in timing.forms:

        def race(run: PytorchContestant) -> tuple[dict[str, Any], list[float]]:
            found = time_rounds({"jaxunet": ours, "it": run}, timing.rounds, timing.seconds)
            described = {
                **describe(found["it"], batch_size, flops),
                "warm_up_seconds": run.warm_up_seconds,
                "peak_bytes": run.peak_bytes(),
                "jaxunet_over_it": ratio(found["jaxunet"], found["it"]),
                "first_loss": run.loss,
            }
            return described, found["jaxunet"]

        outcome = with_form(form, config, mode, state, batch_size, race)
        if isinstance(outcome, str):
            unavailable[form] = outcome
        else:
            theirs[form], more = outcome
            times += more
            entry["jaxunet"] = _describe(ours, times, batch_size, flops, peak_rate)
            if (loss := theirs[form].pop("first_loss")) is not None:
                entry["first_loss"][form] = loss
            # Judged round by round: the machine may be slower while another form has its turn.
            best = max(theirs, key=lambda each: theirs[each]["jaxunet_over_it"]["median"])
            entry["pytorch_best"] = best
            entry["ratio_to_pytorch"] = theirs[best]["jaxunet_over_it"]
        save()


def _describe(
    ours: StepContestant, times: Sequence[float], batch_size: int, flops: float, rate: float
) -> dict[str, Any]:
    found = describe(times, batch_size, flops)
    return {
        **found,
        "share_of_matmul_rate": found["flops_per_second"] / rate,
        "compile_seconds": ours.compile_seconds,
        "cached_compile_seconds": ours.cached_compile_seconds,
        "warm_up_seconds": ours.warm_up_seconds,
        "program_bytes": ours.program_bytes,
    }
