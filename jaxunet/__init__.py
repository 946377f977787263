"""A pure-functional JAX U-Net for skin-lesion segmentation.

What one works with; each name is imported when it is first asked for, so that `import jaxunet`
is light. From a configuration to a mask:

    config = jaxunet.Config()
    jaxunet.train(config, jaxunet.prepare(config.data), "runs/a")
    mask = jaxunet.load("runs/a").predict(image)
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError(
        "jaxunet runs on Linux and macOS; on Windows, run it in WSL2 (ArrayRecord, which it "
        "stores data in, has no build for Windows itself)."
    )

from jaxunet.augmentation_config import AugmentationConfig
from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.errors import ConfigError, DataError, JaxUNetError, RunError, Stopped

if TYPE_CHECKING:
    from jaxunet.data.prepare import prepare
    from jaxunet.inference.model import evaluate, load
    from jaxunet.model.unet import UNet, make_unet
    from jaxunet.runs.training import train

_LATER = {
    "UNet": "jaxunet.model.unet",
    "evaluate": "jaxunet.inference.model",
    "load": "jaxunet.inference.model",
    "make_unet": "jaxunet.model.unet",
    "prepare": "jaxunet.data.prepare",
    "train": "jaxunet.runs.training",
}

__all__ = [
    "AugmentationConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataError",
    "JaxUNetError",
    "ModelConfig",
    "OptimizerConfig",
    "RunError",
    "Stopped",
    "TrainConfig",
    "UNet",
    "evaluate",
    "load",
    "make_unet",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return __all__
