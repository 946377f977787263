"""timm, also where the torchvision that it asks for was built for another PyTorch."""

import importlib
import sys
from unittest import mock

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):  # it may be built for another PyTorch
    # timm asks for these when it is imported; of the models here none uses them.
    for name in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
        sys.modules[f"torchvision{name}"] = mock.MagicMock()
import timm

__all__ = ["timm"]
