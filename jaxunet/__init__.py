"""A pure-functional JAX U-Net for skin-lesion segmentation."""

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
