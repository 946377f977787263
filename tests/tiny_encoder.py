"""EfficientNet-Lite0 with a block a stage and few channels, which compiles in seconds."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jaxunet.config import ModelConfig
from jaxunet.model.encoders import efficientnet_lite
from jaxunet.pretrained.renaming import shapes_of

# Of a configuration that no other test has, as recipes are kept by configuration.
TINY = ModelConfig(encoder="efficientnet_lite0", decoder_width=3, norm="batch")


@contextmanager
def tiny_encoder() -> Iterator[None]:
    """`TINY` is such a network inside."""
    stages = tuple((3, stride, 2, 8, 1) for stride in (1, 2, 2, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet_lite, "STAGES", stages)
        patch.setattr(efficientnet_lite, "MAPS", tuple(range(len(stages))))
        patch.setattr(efficientnet_lite, "STEM", 8)
        shapes_of.cache_clear()
        yield
    shapes_of.cache_clear()
