"""What is asked of XLA on a GPU, and what is kept of its search.

No card is needed: where JAX starts is pretended, and so is what XLA leaves behind.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scripts import SMALL
from scripts import run as run_script

from jaxunet.config import TrainConfig
from jaxunet.devices import tuning
from jaxunet.devices.tuning import Tuning
from jaxunet.runs.loading import load

SEARCH = """
import os, sys
from pathlib import Path
from jaxunet.config import TrainConfig
from jaxunet.devices import tuning
tuning.on_gpu = lambda: True
run, found = Path(sys.argv[1]), sys.argv[2]
tuning.use(tuning.Tuning(tune=sys.argv[3]), run)
named = dict(flag[2:].split("=") for flag in os.environ["XLA_FLAGS"].split())
loaded = named.get("xla_gpu_load_autotune_results_from")
print(Path(loaded).read_text() if loaded else "nothing")
import jax
print(jax.jit(lambda x: x + 1)(1))
if found:  # XLA would write it while it compiles
    Path(named["xla_gpu_dump_autotune_results_to"]).write_text(found)
tuning.keep(run)
print(os.environ["XLA_FLAGS"])
"""


def search(tmp_path: Path, run: str, found: str = "", tune: str = "full") -> list[str]:
    """A process that begins with what it says, and finds `found`; what it says of it."""
    (tmp_path / run).mkdir(exist_ok=True)
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, tmp_path / run, found, tune],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **variables},
    )
    return done.stdout.splitlines()


@pytest.fixture
def flags(monkeypatch):
    """XLA_FLAGS after `Tuning` was put to use on a machine with, or without, a GPU."""

    def used(*, gpu: bool = True, given: str = "", **options) -> list[str]:
        monkeypatch.setenv("XLA_FLAGS", given)
        monkeypatch.setattr(tuning, "on_gpu", lambda: gpu)
        monkeypatch.setattr(tuning, "_open_folder", lambda *_: ["--files"])
        caches = jax.config.jax_persistent_cache_enable_xla_caches
        try:
            tuning.use(Tuning(**options))
            return os.environ["XLA_FLAGS"].split()
        finally:
            jax.config.update("jax_persistent_cache_enable_xla_caches", caches)

    return used


def test_each_option_is_its_flags_of_xla(flags):
    assert flags() == ["--files"]
    assert flags(tune="quick") == ["--xla_gpu_autotune_level=2", "--files"]
    assert flags(tune="none") == ["--xla_gpu_autotune_level=0"]
    assert flags(tune="quick", deterministic=True) == [
        "--xla_gpu_deterministic_ops=true",
        "--xla_gpu_exclude_nondeterministic_ops=true",
    ]


def test_without_a_gpu_nothing_is_asked_for(flags):
    assert flags(gpu=False, given="--mine", tune="none", deterministic=True) == ["--mine"]


def test_a_users_own_flags_stay_and_an_option_comes_after_them(flags):
    own = "--xla_gpu_autotune_level=1 --mine"
    assert flags(given=own) == [*own.split(), "--files"]
    assert tuning.record()["tune"] == "level 1"
    flags(given=own, tune="quick")
    assert tuning.record()["tune"] == "quick"
    own = "--xla_gpu_dump_autotune_results_to=/here.textproto"
    assert flags(given=own) == [own]


def test_only_a_full_search_shares_xlas_files_by_fusion(monkeypatch):
    updated = []
    monkeypatch.setattr(tuning, "on_gpu", lambda: True)
    monkeypatch.setattr(tuning, "_open_folder", lambda *_: [])
    monkeypatch.setattr(jax.config, "update", lambda *words: updated.append(words))
    monkeypatch.setenv("XLA_FLAGS", "")
    tuning.use(Tuning())
    assert not updated
    tuning.use(Tuning(deterministic=True))
    assert updated == [("jax_persistent_cache_enable_xla_caches", "none")]


def test_what_is_recorded_is_what_a_resumed_run_goes_on_with(flags):
    flags(tune="quick", deterministic=True)
    assert tuning.recorded({"tuning": tuning.record()}) == {
        "tune": "none",  # nothing is timed
        "deterministic": True,
    }
    flags(tune="quick")
    kept = tuning.recorded(json.loads(json.dumps({"tuning": tuning.record()})))
    assert Tuning(**kept) == Tuning(tune="quick")
    assert tuning.recorded({}) == tuning.recorded({"tuning": "not on a GPU"}) == {}


def test_a_run_goes_on_with_the_results_it_began_with(tmp_path):
    first = search(tmp_path, "a", found="of the first")
    assert first[:2] == ["nothing", "2"]  # and a CPU takes the flags as they are
    second = search(tmp_path, "b", found="of the second")
    assert second[0] == "of the first"
    # As resumed or evaluated, at whatever level; others begin with the newest of their level.
    again = search(tmp_path, "a", found="of a again", tune="quick")
    assert again[0] == "of the first"
    assert search(tmp_path, "q", tune="quick")[0] == "nothing"
    third = search(tmp_path, "c")
    assert third[0] == "of the second"
    # From JAX's cache of programs nothing is searched for, so the run keeps what it loaded.
    search(tmp_path, "d", found="of d")
    assert search(tmp_path, "c")[0] == "of the second"
    # Else JAX would not find the programs of one run, in its cache, for another.
    assert second[-1] == third[-1]
    assert not list(tmp_path.glob("jaxunet-tuning-*"))


def test_on_a_cpu_the_options_change_nothing(tmp_path):
    words = ("train.py", *SMALL, "--data.prepared-dir", tmp_path / "data")
    said = run_script(*words, "--tune", "none", "--deterministic", "--out", tmp_path / "run")
    assert len(re.findall(r"compiled the train and eval steps in \d+\.\d s", said)) == 1
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["tuning"] == "not on a GPU"
    assert not (tmp_path / "run" / "tuning").exists()


@pytest.mark.parametrize(
    ("platforms", "gpu"), [("cpu", False), ("tpu,cpu", False), ("cuda", True), ("gpu", True)]
)
def test_a_platform_that_is_asked_for_is_taken_at_its_word(monkeypatch, platforms, gpu):
    monkeypatch.setattr(
        tuning, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms))
    )
    assert tuning.on_gpu() is gpu


def test_else_it_takes_a_card_and_what_drives_it(monkeypatch, tmp_path):
    monkeypatch.setattr(
        tuning, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=None))
    )
    card = tmp_path / "nvidia0"
    monkeypatch.setattr(tuning, "DEVICE_FILES", (str(card),))
    monkeypatch.setattr(tuning, "PLUGINS", ("json",))  # is there
    assert not tuning.on_gpu()
    card.touch()
    assert tuning.on_gpu()
    monkeypatch.setattr(tuning, "PLUGINS", ("not_a_plugin",))
    assert not tuning.on_gpu()


@pytest.mark.parametrize(("platform", "expected"), [("cpu", 4), ("tpu", 4), ("gpu", 32)])
def test_only_a_gpu_evaluates_in_training_batches_unless_asked_otherwise(
    monkeypatch, platform, expected
):
    monkeypatch.setattr(tuning.jax, "devices", lambda: [SimpleNamespace(platform=platform)])
    assert tuning.eval_batch_size(TrainConfig(batch_size=32)) == expected
    assert tuning.eval_batch_size(TrainConfig(batch_size=32, eval_batch_size=6)) == 6


@pytest.mark.skipif(
    jax.devices()[0].platform != "gpu",
    reason="takes a GPU: on a CPU all runs are equal bit for bit, as test_training.py shows",
)
def test_deterministic_runs_and_a_resumed_one_are_equal_on_a_gpu(tmp_path, monkeypatch):
    # Else the second process would find the programs of the first.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    words = ["train.py", *SMALL, "--optimizer.schedule", "constant", "--deterministic"]
    words += ["--data.prepared-dir", tmp_path / "data"]
    for run in ("a", "b"):
        run_script(*words, "--out", tmp_path / run)
    run_script(*words, "--train.epochs", 1, "--out", tmp_path / "resumed")
    run_script(*words, "--out", tmp_path / "resumed", "--resume")
    recorded = json.loads((tmp_path / "resumed" / "config.json").read_text())["tuning"]
    assert recorded["deterministic"]
    a, b, resumed = (load(tmp_path / run) for run in ("a", "b", "resumed"))
    assert a.step == b.step == resumed.step > 1
    for other in (b, resumed):
        jax.tree.map(np.testing.assert_array_equal, a.variables, other.variables)
