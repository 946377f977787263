"""libtpu is answered where there is no TPU, and left alone where there may be one."""

import importlib.util
import os
import subprocess
import sys
from unittest import mock

import pytest

from jaxunet.devices import libtpu


@pytest.fixture
def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    with mock.patch.dict(os.environ, kept, clear=True):
        yield os.environ


# On such a machine JAX itself sets the first; the folder is every host's that has virtual ones.
@pytest.mark.parametrize("name", ["TPU_SKIP_MDS_QUERY", "HOME"])
def test_where_no_tpu_is_seen_what_is_unset_is_answered(name, environment, tmp_path):
    environment[name] = "mine"
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio/vfio").touch()
    libtpu.answer_if_absent(tmp_path)
    for variable, value in libtpu.ANSWERS.items():
        assert environment[variable] == ("mine" if variable == name else value)


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_where_a_tpu_is_seen_the_environment_is_left_alone(device, environment, tmp_path):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    before = dict(environment)
    libtpu.answer_if_absent(tmp_path)
    assert environment == before


def test_where_the_environment_speaks_of_a_tpu_it_is_left_alone(environment, tmp_path):
    environment["TPU_NAME"] = "slice"
    before = dict(environment)
    libtpu.answer_if_absent(tmp_path)
    assert environment == before


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (the extra [tpu])",
)
def test_with_libtpu_a_machine_without_a_tpu_starts_on_its_cpu_without_a_word(environment):
    kept = {k: v for k, v in environment.items() if k not in ("JAX_PLATFORMS", *libtpu.ANSWERS)}
    code = (
        "from jaxunet.devices.startup import start; start(); import jax; print(jax.devices())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu" in done.stdout.lower()
