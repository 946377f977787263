"""What the scripts set up, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_experiments import SMALL
from test_experiments import run as run_script

FAULTS = """
import resource
from jaxunet.startup import keep_freed_memory
print(keep_freed_memory())
import jax, jax.numpy as jnp
# Its temporary has 64 MiB: up to 32 MiB glibc learns by itself to keep what is freed.
step = jax.jit(lambda x: ((x @ x.T) @ x).sum())
x = jnp.ones((4096, 8))
for _ in range(5):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

CACHE = """
import jax
from jaxunet.startup import use_compilation_cache
print(use_compilation_cache())
print(jax.jit(lambda x: x + 1)(1))
"""


def run(code: str, **variables: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "MALLOC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, "XLA_FLAGS": "", **variables},
    )
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_a_step_faults_no_pages_once_freed_memory_is_kept():
    done, faults = run(FAULTS)
    left_alone, default_faults = run(FAULTS, MALLOC_ARENA_TEST="8")
    assert (done, left_alone) == ("True", "False")
    assert int(faults) < 0.3 * int(default_faults)


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
    folder, result = run(CACHE, XDG_CACHE_HOME=str(tmp_path))
    assert Path(folder) == tmp_path / "jaxunet" / "xla"
    assert result == "2"
    assert any(Path(folder).iterdir())


def test_the_cache_can_be_elsewhere_or_off(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    elsewhere = str(tmp_path / "elsewhere")
    assert run(CACHE, JAX_COMPILATION_CACHE_DIR=elsewhere, **home) == [elsewhere, "2"]
    assert run(CACHE, JAX_ENABLE_COMPILATION_CACHE="false", **home) == ["None", "2"]
    assert not (tmp_path / "home").exists()


def test_a_second_start_of_the_same_run_compiles_nothing(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    words = ("train.py", *SMALL, "--data.prepared-dir", tmp_path / "data")
    run_script(*words, "--out", tmp_path / "first")
    programs = {path.name for path in cache.iterdir() if path.name.endswith("-cache")}
    assert len(programs) > 3
    run_script(*words, "--out", tmp_path / "second")
    assert {path.name for path in cache.iterdir() if path.name.endswith("-cache")} == programs
