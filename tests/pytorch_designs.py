"""The two PyTorch designs that jaxunet mirrors, written from their descriptions.

Beside `forward`, both can have one skip connection zeroed, to see whether it is used.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class ReferenceUNet(nn.Module):
    """The reference: no normalisation, cropped skips, `[upsampled, skip]`."""

    def __init__(self, width: int = 64, depth: int = 5, num_logits: int = 1):
        super().__init__()
        channels = [width * 2**level for level in range(depth)]
        for number, pair in enumerate(pairwise([3, *channels]), 1):
            self.add_module(f"downConv{number}", self._double_conv(*pair))
        for number, (coarse, fine) in enumerate(pairwise(channels[::-1]), 1):
            self.add_module(f"upTrans{number}", nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.add_module(f"upConv{number}", self._double_conv(coarse, fine))
        self.out = nn.Conv2d(width, num_logits, 1)
        self.depth = depth

    @staticmethod
    def _double_conv(before: int, features: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, features, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor, without_skip: int | None = None) -> torch.Tensor:
        maps = []
        for number in range(1, self.depth + 1):
            x = F.max_pool2d(x, 2) if maps else x
            x = self.get_submodule(f"downConv{number}")(x)
            maps.append(x)
        maps.pop()
        for number in range(1, self.depth):
            level, skip = len(maps) - 1, maps.pop()
            x = self.get_submodule(f"upTrans{number}")(x)
            height, width = x.shape[2:]
            top, left = (skip.shape[2] - height) // 2, (skip.shape[3] - width) // 2
            skip = skip[:, :, top : top + height, left : left + width]
            if level == without_skip:
                skip = torch.zeros_like(skip)
            x = self.get_submodule(f"upConv{number}")(torch.cat([x, skip], 1))
        return self.out(x)


class _DoubleConv(nn.Module):
    def __init__(self, before: int, middle: int, features: int, bias: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((before, middle), (middle, features)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=bias), nn.BatchNorm2d(b), nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.double_conv(x)


class _Down(nn.Module):
    def __init__(self, before: int, features: int, bias: bool):
        super().__init__()
        conv = _DoubleConv(before, features, features, bias)
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.maxpool_conv(x)


class _Up(nn.Module):
    def __init__(self, joined: int, features: int, bilinear: bool, bias: bool):
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(joined, joined // 2, 2, stride=2)
        self.conv = _DoubleConv(joined, joined // 2, features, bias)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        rows, columns = (a - b for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return self.conv(torch.cat([skip, x], 1))


class _OutConv(nn.Module):
    def __init__(self, features: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(features, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class MilesialUNet(nn.Module):
    """milesial/Pytorch-UNet: batch norm, padded upsampled maps, `[skip, upsampled]`."""

    def __init__(
        self,
        width: int = 64,
        depth: int = 5,
        num_logits: int = 2,
        *,
        bilinear: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        halved = 2 if bilinear else 1
        channels = [width * 2**level for level in range(depth)]
        channels[-1] //= halved
        self.inc = _DoubleConv(3, width, width, bias)
        for number, pair in enumerate(pairwise(channels), 1):
            self.add_module(f"down{number}", _Down(*pair, bias))
        for number in range(1, depth):
            fine = width * 2 ** (depth - 1 - number)
            features = fine // halved if number < depth - 1 else fine
            self.add_module(f"up{number}", _Up(2 * fine, features, bilinear, bias))
        self.outc = _OutConv(width, num_logits)
        self.depth = depth

    def forward(self, x: torch.Tensor, without_skip: int | None = None) -> torch.Tensor:
        maps = [self.inc(x)]
        for number in range(1, self.depth):
            maps.append(self.get_submodule(f"down{number}")(maps[-1]))
        x = maps.pop()
        for number in range(1, self.depth):
            level, skip = len(maps) - 1, maps.pop()
            if level == without_skip:
                skip = torch.zeros_like(skip)
            x = self.get_submodule(f"up{number}")(x, skip)
        return self.outc(x)


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which every layer shapes the logits, in eval mode.

    PyTorch's default ones shrink the signal at each layer until the biases of the last ones
    all but make the logits, so that a fault deep down would hide within any tolerance.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.ConvTranspose2d):  # whose fan-in PyTorch takes wrongly
                nn.init.normal_(module.weight, std=(1 / module.in_channels) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(17)
    return model.eval()


def arrays(model: nn.Module) -> dict:
    """The state dict as NumPy arrays of their own memory."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
