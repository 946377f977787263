"""The reference design in PyTorch, to train and to time beside jaxunet.

Import this module only where PyTorch is asked for.
"""

import itertools

from jaxunet.config import ModelConfig
from jaxunet.errors import ConfigError

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise ConfigError(
        "This needs PyTorch: python -m pip install -e '.[torch]', or leave out --against."
    ) from error


def double_conv(channels: int, features: int) -> nn.Sequential:
    """Twice: 3x3 convolution that keeps the size, with bias, and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, features, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(features, features, 3, padding=1),
        nn.ReLU(inplace=True),
    )


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of `x`; an odd remainder is cut from the far side."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


class ReferenceUNet(nn.Module):
    """The reference U-Net of any width and depth, with the names of its state_dict.

    `downConv1..N.{0,2}`, `upTrans1..N-1`, `upConv1..N-1.{0,2}`, `out`. Images are NCHW.
    """

    def __init__(self, width: int = 64, depth: int = 5):
        super().__init__()
        features = [width * 2**level for level in range(depth)]
        for level, (channels, out) in enumerate(itertools.pairwise([3, *features]), 1):
            self.add_module(f"downConv{level}", double_conv(channels, out))
        for step, (coarse, fine) in enumerate(itertools.pairwise(reversed(features)), 1):
            self.add_module(f"upTrans{step}", nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.add_module(f"upConv{step}", double_conv(coarse, fine))
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Conv2d(width, 1, 1)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 1, height, width] of normalised images [batch, 3, height, width]."""
        skips: list[Tensor] = []
        for level in range(1, self.depth + 1):
            x = getattr(self, f"downConv{level}")(self.pool(x) if level > 1 else x)
            skips.append(x)
        skips.pop()
        for step in range(1, self.depth):
            x = getattr(self, f"upTrans{step}")(x)
            skip = center_crop(skips.pop(), x.shape[2], x.shape[3])
            x = getattr(self, f"upConv{step}")(torch.cat([x, skip], dim=1))
        return self.out(x)


def make_pytorch_unet(config: ModelConfig) -> ReferenceUNet:
    """The PyTorch model of a configuration.

    Raises:
        ConfigError: the configuration departs from the reference in more than size.
    """
    plain = ModelConfig(width=config.width, depth=config.depth, init=config.init)
    if config != plain:
        raise ConfigError(
            "Only the reference design, at any width and depth, has its PyTorch side here; "
            f"found {config}."
        )
    return ReferenceUNet(config.width, config.depth)


def counts_and_losses(logits: Tensor, masks: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Of each image the counts of `jaxunet.learning.metrics` [batch, 4] and the BCE [batch].

    Args:
        logits, masks: [batch, 1, height, width]; the masks are bool.
    """
    found = logits.sigmoid() > threshold
    pairs = (found & masks, found & ~masks, ~found & masks, ~found & ~masks)
    each = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none")
    return torch.stack([pair.sum((1, 2, 3)) for pair in pairs], dim=1), each.mean((1, 2, 3))
