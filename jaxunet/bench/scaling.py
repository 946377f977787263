"""What share of linear scaling several devices reach, and what limits it."""

from dataclasses import replace
from typing import Any

import jax

from jaxunet.bench.rounds import Contestant, describe, ratio, time_rounds
from jaxunet.bench.setting import Setting, Timing
from jaxunet.bench.steps import make_step
from jaxunet.devices.strategies import make_strategy


def measure_scaling(
    setting: Setting, timing: Timing, together: Contestant, state: Any
) -> dict[str, Any]:
    """The train step of all devices in turn with that of one on its part of the batch.

    Args:
        together: the train step of `setting`, whose devices are several.
        state: a `TrainState` on the host.

    Returns:
        `share`: images a second of all, over as many times those of one: one's time over that
        of all, round by round. `one_device` and `all_devices`, each as
        `jaxunet.bench.rounds.describe` has it; `gradient_bytes`, which are summed at each step.
    """
    whole, count = setting.config.train.batch_size, setting.devices
    part = whole // count
    config = replace(setting.config, train=replace(setting.config.train, batch_size=part))
    one = make_step(
        make_strategy(setting.parallel, jax.devices()[:1]),
        config,
        "train",
        state,
        part,
    )
    times = time_rounds({"one": one, "all": together}, timing.rounds, timing.seconds)
    return {
        "devices": count,
        "share": ratio(times["one"], times["all"]),
        "one_device": describe(times["one"], part),
        "all_devices": describe(times["all"], whole),
        "gradient_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)),
    }


def limit(point: dict[str, Any]) -> str:
    """In a line what keeps a point that has `scaling` from linear scaling, as far as it was
    measured: what the devices do together, or what feeds them."""
    found = point["scaling"]
    alone, together = (
        1e3 * found[name]["step_seconds"]["median"] for name in ("one_device", "all_devices")
    )
    megabytes = found["gradient_bytes"] / 1e6
    said = (
        f"On {found['devices']} devices {found['share']['median']:.0%} of linear scaling: a "
        f"step takes {together:.2f} ms, one device's part by itself {alone:.2f}. "
    )
    summing = f"summing {megabytes:.3g} MB of gradients and waiting for one another"
    if "training" not in point:
        return f"{said}The rest is {summing}; what feeding them costs was not measured."
    cache, fed = min(
        ((name, each["ratio_to_step"]["median"]) for name, each in point["training"].items()),
        key=lambda pair: pair[1],
    )
    feeding, joint = (fed - 1) * together, together - alone
    more = f"End to end (cache {cache}) it is {found['share']['median'] / fed:.0%}: "
    if feeding > joint:
        return f"{said}{more}feeding limits it, by {feeding:.2f} ms a step."
    return f"{said}{more}{summing} limits it, by {joint:.2f} ms a step."
