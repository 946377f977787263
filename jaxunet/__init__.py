"""A pure-functional JAX U-Net for skin-lesion segmentation."""

import sys

if sys.platform == "win32":
    raise ImportError(
        "jaxunet runs on Linux and macOS; on Windows, run it in WSL2 (ArrayRecord, which it "
        "stores data in, has no build for Windows itself)."
    )

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.errors import ConfigError, DataError, JaxUNetError, RunError

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DataError",
    "JaxUNetError",
    "ModelConfig",
    "OptimizerConfig",
    "RunError",
    "TrainConfig",
]
