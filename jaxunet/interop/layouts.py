"""How PyTorch U-Nets name and shape their tensors, beside jaxunet's variables.

A layout lists, for one `ModelConfig`, every tensor of the state dict with the variable that
it becomes. Import, export and the messages about what doesn't fit all follow that list.

    reference   downConv1.0.weight, upTrans1.weight, upConv1.0.weight, out.weight, ...
    milesial    inc.double_conv.0.weight, down1.maxpool_conv.1.double_conv.0.weight,
                up1.up.weight, up1.conv.double_conv.0.weight, outc.conv.weight, ...
                (github.com/milesial/Pytorch-UNet)

Both count upwards from the bottom: `upTrans1` and `up1` are the coarsest.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from jaxunet.config import ModelConfig
from jaxunet.errors import ConfigError, DataError, shown

LayoutName = Literal["reference", "milesial"]
Kind = Literal["conv", "transposed", "head", "vector", "counter"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a state dict.

    Attributes:
        name: PyTorch's key.
        path: where the variable stands in jaxunet's tree; empty for a `counter`
            (batch norm's `num_batches_tracked`), which has none.
        shape: PyTorch's.
        kind: how the two are converted; see `jaxunet.interop.pytorch`.
    """

    name: str
    path: tuple[str, ...]
    shape: Shape
    kind: Kind


# What a configuration must have to be of a layout; the rest is free.
REQUIREMENTS: dict[LayoutName, dict[str, object]] = {
    "reference": {
        "encoder": "plain",
        "norm": "none",
        "upsampling": "transposed",
        "skip": "crop",
        "concat": "upsampled_first",
        "conv_bias": True,
    },
    # Its convolutions had a bias until 2022, so checkpoints with and without are about.
    "milesial": {"encoder": "plain", "norm": "batch", "skip": "pad", "concat": "skip_first"},
}

# At the start of a name, or behind the dot that ends a prefix.
_OWN_NAMES: dict[LayoutName, re.Pattern[str]] = {
    "reference": re.compile(r"(?<![^.])(?:(downConv|upTrans|upConv)(\d{1,9})\.|out\.)"),
    "milesial": re.compile(
        r"(?<![^.])(?:(down|up)(\d{1,9})\.(maxpool_conv|conv|up)\.|(inc|outc)\.)"
    ),
}


def _depth(match: re.Match[str]) -> int:
    """The levels that a U-Net has at least, if one of its tensors has this name."""
    return int(match[2]) + (match[1] != "downConv") if match[2] else 0


def prefixes(names: Iterable[str]) -> list[str]:
    """Those under which tensors of two levels or more of a known layout stand.

    Wrappers put them before the layout's own names: `module.` (DataParallel), `_orig_mod.`
    (torch.compile), the attribute of a Lightning module. The empty one is one of them.
    """
    depths: dict[str, int] = {}
    for name in names:
        for pattern in _OWN_NAMES.values():
            if match := pattern.search(name):
                prefix = name[: match.start()]
                depths[prefix] = max(depths.get(prefix, 0), _depth(match))
    return [prefix for prefix, depth in depths.items() if depth >= 2]


def layout_of(config: ModelConfig) -> LayoutName:
    """The PyTorch layout that `config` can be written in.

    Raises:
        ConfigError: there is none; the message says what each layout would need.
    """
    reasons = []
    for layout, needed in REQUIREMENTS.items():
        wrong = [
            f"model.{name} {value!r} (it is {getattr(config, name)!r})"
            for name, value in needed.items()
            if getattr(config, name) != value
        ]
        if not wrong:
            return layout
        reasons.append(f"{layout} needs {', '.join(wrong)}")
    raise ConfigError(
        f"This model has no PyTorch layout that jaxunet can write: {'; '.join(reasons)}."
    )


def entries(layout: LayoutName, config: ModelConfig) -> list[Entry]:
    """Every tensor of the state dict of `config`, in PyTorch's order."""
    return list((_reference if layout == "reference" else _milesial)(config))


def _reference(config: ModelConfig) -> Iterator[Entry]:
    for level, (before, features) in enumerate(_encoder_channels(config)):
        for i, channels in enumerate((before, features)):
            path = ("encoder", f"level_{level}", f"conv_{i}")
            yield from _conv(f"downConv{level + 1}.{2 * i}", path, channels, features)
    for number in range(1, config.depth):
        level = config.depth - 1 - number
        features = config.width * 2**level
        path = ("decoder", f"level_{level}", "up")
        yield from _transposed(f"upTrans{number}", path, 2 * features, features)
        for i, channels in enumerate((2 * features, features)):
            path = ("decoder", f"level_{level}", f"conv_{i}")
            yield from _conv(f"upConv{number}.{2 * i}", path, channels, features)
    yield from _head("out", config)


def _milesial(config: ModelConfig) -> Iterator[Entry]:
    def double_conv(name: str, where: str, level: int, channels: tuple[int, int, int]):
        for i in range(2):
            path = (where, f"level_{level}")
            yield from _conv(
                f"{name}.double_conv.{3 * i}",
                (*path, f"conv_{i}"),
                channels[i],
                channels[i + 1],
                bias=config.conv_bias,
            )
            norm = f"{name}.double_conv.{3 * i + 1}"
            yield from _batch_norm(norm, (*path, f"norm_{i}"), channels[i + 1])

    for level, (before, features) in enumerate(_encoder_channels(config)):
        name = f"down{level}.maxpool_conv.1" if level else "inc"
        yield from double_conv(name, "encoder", level, (before, features, features))
    for number in range(1, config.depth):
        level = config.depth - 1 - number
        skip = config.width * 2**level
        features = skip
        if config.upsampling == "transposed":
            path = ("decoder", f"level_{level}", "up")
            yield from _transposed(f"up{number}.up", path, 2 * skip, skip)
        elif level:
            features //= 2
        name = f"up{number}.conv"
        yield from double_conv(name, "decoder", level, (2 * skip, skip, features))
    yield from _head("outc.conv", config)


def _encoder_channels(config: ModelConfig) -> list[tuple[int, int]]:
    """Channels that go into each level and come out of it."""
    out = [config.width * 2**level for level in range(config.depth)]
    if config.upsampling == "bilinear":
        out[-1] //= 2
    return list(zip([3, *out[:-1]], out, strict=True))


def _conv(
    name: str, path: tuple[str, ...], channels: int, features: int, *, bias: bool = True
) -> Iterator[Entry]:
    kernel = ("params", *path, "kernel")
    yield Entry(f"{name}.weight", kernel, (features, channels, 3, 3), "conv")
    if bias:
        yield Entry(f"{name}.bias", ("params", *path, "bias"), (features,), "vector")


def _transposed(
    name: str, path: tuple[str, ...], channels: int, features: int
) -> Iterator[Entry]:
    kernel = ("params", *path, "kernel")
    yield Entry(f"{name}.weight", kernel, (channels, features, 2, 2), "transposed")
    yield Entry(f"{name}.bias", ("params", *path, "bias"), (features,), "vector")


def _batch_norm(name: str, path: tuple[str, ...], features: int) -> Iterator[Entry]:
    for theirs, collection, ours in (
        ("weight", "params", "scale"),
        ("bias", "params", "bias"),
        ("running_mean", "batch_stats", "mean"),
        ("running_var", "batch_stats", "var"),
    ):
        yield Entry(f"{name}.{theirs}", (collection, *path, ours), (features,), "vector")
    yield Entry(f"{name}.num_batches_tracked", (), (), "counter")


def _head(name: str, config: ModelConfig) -> Iterator[Entry]:
    shape = (config.num_logits, config.width, 1, 1)
    yield Entry(f"{name}.weight", ("params", "head", "kernel"), shape, "head")
    yield Entry(f"{name}.bias", ("params", "head", "bias"), shape[:1], "vector")


def recognize(shapes: Mapping[str, Shape]) -> tuple[LayoutName, ModelConfig]:
    """The layout and the configuration that names and shapes of tensors speak of.

    What is broken or missing in part is outvoted by the rest, so that it can be named.

    Raises:
        DataError: the names are of no known layout, or contradict every configuration.
    """
    own = {
        layout: [match for name in shapes if (match := pattern.match(name))]
        for layout, pattern in _OWN_NAMES.items()
    }
    layout = max(own, key=lambda name: len(own[name]))
    depth = max(map(_depth, own[layout]), default=0)
    if depth < 2:
        raise DataError(
            "These are not the weights of a U-Net that jaxunet knows. Known: the reference "
            "(downConv1.0.weight, upTrans1.weight, ...) and milesial/Pytorch-UNet "
            f"(inc.double_conv.0.weight, ...). Found: "
            f"{', '.join(map(shown, list(shapes)[:6])) or 'nothing'}."
        )
    # Channels double at each level: a 3x3 kernel of the last has 9 * 4**(depth - 1) values
    # or more. Told by its bits, for the number itself may be too large to be made.
    values = sum(map(math.prod, shapes.values()))
    if 2 * (depth - 1) >= values.bit_length():
        raise DataError(
            f"A tensor is named for level {depth}, but a U-Net of {depth} levels has more "
            f"weights than the {values} values that are here. The file is damaged, or of "
            "another design."
        )
    known = dict(REQUIREMENTS[layout])
    if layout == "milesial":
        up = any(re.match(r"up\d+\.up\.", name) for name in shapes)
        biases = sum(bool(re.search(r"double_conv\.[03]\.bias$", name)) for name in shapes)
        convs = sum(bool(re.search(r"double_conv\.[03]\.weight$", name)) for name in shapes)
        known |= {
            "upsampling": "transposed" if up else "bilinear",
            "conv_bias": 2 * biases > convs,
        }
    # Of width 2 first: every first dimension is proportional to it, but the head's. What is
    # known are fields of several types, by name, which mypy doesn't follow.
    config = ModelConfig(width=2, depth=depth, **known)  # type: ignore[arg-type]
    votes: list[int] = []
    logits: list[int] = []
    for entry in entries(layout, config):
        found = shapes.get(entry.name, ())
        if not found or not entry.shape:
            continue
        if "head" in entry.path:
            logits.append(found[0])
        elif found[0] and 2 * found[0] % entry.shape[0] == 0:
            votes.append(2 * found[0] // entry.shape[0])
    try:
        return layout, replace(
            config,
            width=max(votes, key=votes.count) if votes else 0,
            num_logits=logits[0] if logits else 1,
        )
    except ConfigError as error:
        raise DataError(f"These weights fit no U-Net of jaxunet: {error}") from error
