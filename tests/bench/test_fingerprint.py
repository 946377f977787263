"""Whether the program of the train step is the one that it was: its operations are counted.

`fingerprints.json` holds, for each program, the counts and the versions of libraries that gave
them. After a change that is meant to change the program, write them anew and look at the diff:

    JAXUNET_WRITE_FINGERPRINTS=1 python -m pytest tests/bench/test_fingerprint.py

What the step is lowered to is the same on every machine, also for a TPU and a GPU. What XLA
makes of it is compiled without the CPU's own loops and for the least of x86-64's processors.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxunet.bench.estimate import batch_shapes, compile_step
from jaxunet.bench.steps import arguments_of, step_of
from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.devices import ahead
from jaxunet.devices.strategies import make_strategy
from jaxunet.files import write_atomically
from jaxunet.learning.steps import init_state, make_recipe
from jaxunet.model import cpu

STORED = Path(__file__).with_name("fingerprints.json")
WRITE = "JAXUNET_WRITE_FINGERPRINTS"
LIBRARIES = ("jax", "jaxlib", "flax", "optax")
NO_OPERATIONS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}

# The seed is no part of the program: no other test has these configurations.
PLAIN = Config(
    data=DataConfig(image_size=16),
    model=ModelConfig(width=2, depth=2),
    train=TrainConfig(batch_size=8, seed=1937),
)
RICH = replace(
    PLAIN,
    model=replace(PLAIN.model, norm="batch"),
    optimizer=OptimizerConfig(name="adamw", ema_decay=0.9, clip_norm=1.0),
    train=replace(PLAIN.train, loss="bce_dice"),
)

Counts = dict[str, int]


@pytest.fixture(scope="module")
def traced():
    """The train steps on two devices, without the CPU's own loops, which not every CPU has."""
    jax.clear_caches()  # what other tests traced may hold them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_here", lambda: "off")
        yield {"plain": _trace(PLAIN), "rich": _trace(RICH)}
    jax.clear_caches()


def _trace(config: Config) -> Any:
    strategy = make_strategy("jit", jax.devices()[:2])
    state = jax.eval_shape(partial(init_state, make_recipe(config)))
    arguments = strategy.outline(*arguments_of("train", state, batch_shapes(config)))
    return step_of(strategy, config, "train").trace(*arguments)


def lowered(traced: Any, target: str) -> Counts:
    """Operations of the program before XLA; how functions call each other is JAX's own."""
    program = traced.lower(lowering_platforms=(target,)).compiler_ir("stablehlo").operation
    dialects = ("stablehlo.", "chlo.")
    return dict(Counter(name for name in _names(program) if name.startswith(dialects)))


def _names(operation: Any) -> Iterator[str]:
    yield operation.name
    for region in operation.regions:
        for block in region:
            for inside in block.operations:
                yield from _names(inside.operation)


def optimised(program: str) -> Counts:
    """Operations of a program as XLA leaves it, those inside fusions too."""
    found = re.findall(r"^\s*(?:ROOT )?%?\S+ = .*? ([a-z][\w\-]*)\(", program, re.MULTILINE)
    return {name: n for name, n in Counter(found).items() if name not in NO_OPERATIONS}


def versions(*more: str) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES + more)


def difference(before: Counts, after: Counts) -> str:
    """Which operations came or went; empty if none did."""
    return ", ".join(
        f"{name} {before.get(name, 0)} -> {after.get(name, 0)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, 0) != after.get(name, 0)
    )


def check(program: str, found: Counts, made_by: str, stored: Path = STORED) -> None:
    """Compare with what is stored of the program, or store it if that is asked for."""
    entries = json.loads(stored.read_text()) if stored.exists() else {}
    known: list[dict[str, Any]] = entries.setdefault(program, [])
    mine = next((each for each in known if made_by in each["versions"]), None)
    if os.environ.get(WRITE):
        if mine is not None and mine["operations"] != found:
            mine["versions"].remove(made_by)  # of the others nothing is known
            known[:] = [each for each in known if each["versions"]]
            mine = None
        if mine is None:
            same = next((each for each in known if each["operations"] == found), None)
            if same is None:
                same = {"versions": [], "operations": dict(sorted(found.items()))}
                known.append(same)
            same["versions"] = sorted([*same["versions"], made_by])
        write_atomically(stored, json.dumps(entries, indent=1, sort_keys=True) + "\n")
    elif mine is None:
        said = f"There is no fingerprint of {program} by {made_by}: nothing was compared."
        warnings.warn(f"{said} Write it with {WRITE}=1.", stacklevel=2)
        pytest.skip(said)
    elif changed := difference(mine["operations"], found):
        pytest.fail(
            f"The program of {program} has changed: {changed}. If that is meant, write it "
            f"anew: {WRITE}=1 python -m pytest {Path(__file__).name}",
            pytrace=False,
        )


@pytest.mark.parametrize("target", ["cpu", "tpu", "cuda"])
def test_the_train_step_is_lowered_to_the_operations_that_it_was(traced, target):
    check(f"the train step, lowered for {target}", lowered(traced["plain"], target), versions())


def test_a_step_with_more_options_is_too_and_differs_by_what_they_add(traced):
    rich = lowered(traced["rich"], "cpu")
    check("the train step with more options, lowered for cpu", rich, versions())
    plain = lowered(traced["plain"], "cpu")
    # Batch norm's statistics meet, its outputs are scaled, and the gradients' norm is clipped.
    for name in ("stablehlo.all_reduce", "stablehlo.rsqrt", "stablehlo.minimum"):
        assert f"{name} {plain.get(name, 0)} -> {rich[name]}" in difference(plain, rich)


def test_the_train_step_is_compiled_to_the_operations_that_it_was(traced):
    least = {"xla_cpu_max_isa": "SSE4_2"} if platform.machine() == "x86_64" else {}
    program = traced["plain"].lower().compile(compiler_options=least).as_text()
    by = f"{versions()}, {platform.machine()}"
    check("the train step, compiled for a CPU", optimised(program), by)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (the extra [tpu])",
)
def test_by_libtpu_the_train_step_is_compiled_to_the_operations_that_it_was():
    program = compile_step(ahead.absent("v5e:2x2"), PLAIN, "jit", "train").as_text()
    check("the train step, compiled for TPU v5e:2x2", optimised(program), versions("libtpu"))


def test_a_changed_program_is_named_and_an_unknown_version_is_not_passed_over(
    tmp_path, monkeypatch
):
    stored, before = tmp_path / "stored.json", {"add": 2, "sqrt": 1}
    monkeypatch.setenv(WRITE, "1")
    for version in ("jax 1", "jax 2"):
        check("a step", before, version, stored)
    monkeypatch.delenv(WRITE)
    check("a step", before, "jax 2", stored)
    after = {"add": 3, "tanh": 1}
    with pytest.raises(pytest.fail.Exception, match="add 2 -> 3, sqrt 1 -> 0, tanh 0 -> 1"):
        check("a step", after, "jax 1", stored)
    unknown = "no fingerprint of a step by jax 3"
    with pytest.warns(UserWarning, match=unknown), pytest.raises(pytest.skip.Exception):
        check("a step", after, "jax 3", stored)
    # Written for one version, it stays what it was for the others, until they agree again.
    monkeypatch.setenv(WRITE, "1")
    check("a step", after, "jax 1", stored)
    monkeypatch.delenv(WRITE)
    check("a step", after, "jax 1", stored)
    check("a step", before, "jax 2", stored)
    monkeypatch.setenv(WRITE, "1")
    check("a step", after, "jax 2", stored)
    (only,) = json.loads(stored.read_text())["a step"]
    assert only == {"versions": ["jax 1", "jax 2"], "operations": after}
