import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from scripts import FAST_COMPILE

# Before JAX starts: eight simulated devices, so that sharding is tested everywhere. Compiling
# takes most of the time. Scripts that are run in a process of their own have one device
# (`scripts.environment`).
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", FAST_COMPILE]
)

# PyTorch's threads would wait for each other at every small operation.
os.environ["OMP_NUM_THREADS"] = "1"

# Tests compile the same few programs again and again: a cache for this session's processes.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxunet-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import atexit
import importlib
import shutil
from collections.abc import Iterator
from unittest import mock

import pytest
from jaxtyping import install_import_hook

if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# What a hooked module is the first to import would be compiled from its source: 5 s a process.
for name in ("grain", "matplotlib.figure", "optax", "orbax.checkpoint", "tensorflow_datasets"):
    importlib.import_module(name)
install_import_hook("jaxunet", "typechecker.checked")

REAL_DATA = Path(__file__).parents[2] / "shared" / "isic2018"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real ISIC 2018 pairs, where the machine has it."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real ISIC 2018 pairs are not on this machine")
    return REAL_DATA


@pytest.fixture(scope="session", autouse=True)
def no_figures() -> Iterator[None]:
    """Runs in this process draw none, which would take a third of their time."""
    from jaxunet.runs import training

    with mock.patch.object(training, "write_figures", return_value=[]):
        yield


@pytest.fixture
def figures(no_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test do draw."""
    from jaxunet.runs import reporting, training

    monkeypatch.setattr(training, "write_figures", reporting.write_figures)
