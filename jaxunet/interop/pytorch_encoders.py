"""U-Nets with an encoder of timm's in PyTorch, to time beside jaxunet.

Import this module only where PyTorch is asked for.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from jaxunet.config import ModelConfig
from jaxunet.errors import ConfigError
from jaxunet.interop.pytorch import state_dict_from_variables
from jaxunet.interop.pytorch_unet import Tensor, center_crop, make_pytorch_unet, nn, torch
from jaxunet.model.encoders.registry import LITES
from jaxunet.pretrained.renaming import names_of

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class DecoderLevel(nn.Module):
    """Enlarge, join with the skip if there is one, convolve twice with batch norm."""

    def __init__(self, channels: int, skip_channels: int, features: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, features, 2, stride=2)
        for i, before in enumerate((features + skip_channels, features)):
            self.add_module(f"conv_{i}", nn.Conv2d(before, features, 3, padding=1))
            self.add_module(f"norm_{i}", nn.BatchNorm2d(features))

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = self.up(x)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for i in range(2):
            x = getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x))
            x = torch.relu_(x)
        return x


class EncoderUNet(nn.Module):
    """timm's encoder, jaxunet's decoder of `width` channels at the finest level, the head.

    Its own names are jaxunet's (`decoder.level_3.conv_0`), the encoder's timm's.
    """

    def __init__(self, encoder: nn.Module, channels: list[int], width: int):
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Module()
        *skips, before = [0, *channels]
        for level in reversed(range(len(skips))):
            features = width * 2**level
            self.decoder.add_module(
                f"level_{level}", DecoderLevel(before, skips[level], features)
            )
            before = features
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 1, height, width] of normalised images [batch, 3, height, width]."""
        height, width = x.shape[2:]
        missing = -height % 32, -width % 32
        if any(missing):
            rows, columns = ((count // 2, count - count // 2) for count in missing)
            x = nn.functional.pad(x, (*columns, *rows))
        maps: list[Tensor] = self.encoder(x)
        x, skips = maps[-1], [None, *maps[:-1]]
        for level in reversed(range(len(skips))):
            x = getattr(self.decoder, f"level_{level}")(x, skips[level])
        return center_crop(self.head(x), height, width)


def make_pytorch_model(config: ModelConfig) -> nn.Module:
    """The PyTorch model of a configuration, around an encoder of timm's or plain.

    Raises:
        ConfigError: the configuration has no PyTorch side, or timm is missing.
    """
    if config.encoder == "plain":
        return make_pytorch_unet(config)
    needed = ModelConfig(
        encoder=config.encoder,
        norm="batch",
        init=config.init,
        decoder_width=config.decoder_width,
        width=config.width,  # of the plain encoder, as the depth
        depth=config.depth,
    )
    if config != needed:
        raise ConfigError(
            f"With model.encoder {config.encoder}, only a decoder of any width with model.norm "
            "batch and the other model options as they are by default has its PyTorch side "
            f"here; found {config}."
        )
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"PyTorch's side of model.encoder {config.encoder} is timm's, which can't be "
            f"imported ({error}): python -m pip install timm, or leave out --against."
        ) from error
    name = f"tf_{config.encoder}" if config.encoder in LITES else config.encoder
    encoder: Any = timm.create_model(name, features_only=True)
    return EncoderUNet(encoder, encoder.feature_info.channels(), config.decoder_width)


def load_variables(model: nn.Module, config: ModelConfig, variables: Mapping[str, Any]) -> None:
    """Give the model of `config` the weights, and the statistics, of jaxunet's variables."""
    if config.encoder == "plain":
        state = state_dict_from_variables(config, variables, "reference")
    else:
        state = _state_of(config, variables)
    # Batch norm's counters have no variable and are not used.
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("_tracked")}
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    model.load_state_dict(tensors | counters)


def _state_of(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    encoder = names_of(config.encoder, "timm")
    state = {}
    for path, value in traverse_util.flatten_dict(dict(variables)).items():
        collection, *place, leaf = path
        if place[0] == "encoder":
            name = f"encoder.{encoder[collection, *place[1:], leaf]}"
        else:
            name = ".".join((*place, _LEAVES[leaf]))
        state[name] = _tensor_of(np.asarray(value), transposed=place[-1] == "up")
    return state


def _tensor_of(value: np.ndarray, *, transposed: bool) -> np.ndarray:
    if value.ndim == 2:  # a 1x1 convolution
        value = value.T[:, :, None, None]
    elif value.ndim == 4:
        value = value.transpose((2, 3, 0, 1) if transposed else (3, 2, 0, 1))
    return np.array(value, np.float32, order="C")
