"""What the scripts set up, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from scripts import SMALL
from scripts import run as run_script

from jaxunet.devices import environment, startup

FAULTS = """
import resource
from jaxunet.devices.startup import keep_freed_memory
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
from jaxunet.devices.startup import use_compilation_cache
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


def test_a_user_without_a_home_gets_no_cache_and_no_error(tmp_path, monkeypatch):
    """No HOME and no entry in passwd: `docker --user`, some schedulers."""

    def unknown(*_):
        raise KeyError("uid not found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert startup.use_compilation_cache() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not list(tmp_path.iterdir())


def test_a_platform_that_is_not_there_is_one_sentence(tmp_path):
    platforms = "cuda"
    if any(device.platform == "gpu" for device in jax.devices()):
        platforms = "rocm"
    script = Path(__file__).parents[2] / "experiments" / "gpu_programme.py"
    done = subprocess.run(
        [sys.executable, script, "--out", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": platforms},
    )
    assert done.returncode == 1
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"JAX_PLATFORMS is '{platforms}'" in said
    assert "JAX_PLATFORMS=cpu" in said
    assert "Traceback" not in done.stderr


def test_other_errors_are_not_taken_for_those_of_devices():
    assert startup.device_error(AssertionError()) is None
    assert startup.device_error(ZeroDivisionError()) is None


def test_windows_is_told_where_jaxunet_runs():
    code = "import sys; sys.platform = 'win32'\nimport jaxunet"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "jaxunet runs on Linux and macOS; on Windows, run it in WSL2" in done.stderr


def test_a_deprecated_call_of_our_own_fails_the_tests():
    code = compile("import warnings; warnings.warn('old', FutureWarning)", "x", "exec")
    with pytest.raises(FutureWarning):
        exec(code, {"__name__": "jaxunet.any.module"})


# What is recorded of code and versions


def git(folder, *words):
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_of_the_repository_that_tracks_the_file(tmp_path):
    (tmp_path / "own.py").write_text("1")
    package = tmp_path / "venv" / "package.py"
    package.parent.mkdir()
    package.write_text("2")
    assert environment._git_commit(package, tmp_path) is None
    git(tmp_path, "init")
    git(tmp_path, "add", "own.py")
    git(tmp_path, "commit", "-m", "one")
    head = (tmp_path / ".git" / "refs" / "heads").glob("*")
    own = tmp_path / "own.py"
    assert environment._git_commit(own, tmp_path) == next(head).read_text().strip()
    assert environment._git_commit(package, package.parent) is None  # in another's repository


def test_a_copy_that_another_repository_tracks_has_no_commit_of_its_own(tmp_path):
    copy = tmp_path / "vendored" / "jaxunet.py"
    copy.parent.mkdir()
    copy.write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    assert environment._git_commit(copy, tmp_path) is not None
    assert environment._git_commit(copy, copy.parent) is None


def test_a_package_that_is_used_without_being_installed_is_recorded_so():
    found = environment.environment("no-such-package")["versions"]
    assert found["no-such-package"] is None
    assert found["jax"] == jax.__version__
