"""torchvision as it is, or something that answers to its name.

timm, torchmetrics and others ask for it when they are imported; of what is used of them here
nothing needs it. It may be built for another PyTorch than the one that is installed: a CPU
build, say, as the README advises.
"""

import importlib
import sys
from unittest import mock

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):
    parts = ("datasets", "models", "ops", "ops.misc", "transforms", "transforms.functional")
    for name in ("", *(f".{part}" for part in parts)):
        sys.modules[f"torchvision{name}"] = mock.MagicMock()
