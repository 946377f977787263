import os
import sys

# Before JAX starts: eight simulated devices, so that sharding is tested everywhere.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("jaxunet", "typechecker.checked")

REAL_DATA = Path(__file__).parents[2] / "shared" / "isic2018"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real ISIC 2018 pairs, where the machine has it."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real ISIC 2018 pairs are not on this machine")
    return REAL_DATA
