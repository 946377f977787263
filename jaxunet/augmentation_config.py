"""How far training pictures are varied, a part of `jaxunet.config.Config`."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from jaxunet.ranges import require

Strength = Literal["none", "flip", "standard", "strong"]


@dataclass(frozen=True)
class Ranges:
    """How far each picture is varied: `AugmentationConfig`'s fields, all of them decided.

    With the defaults it stays as it is.
    """

    flip: bool = False
    quarter_turns: bool = False
    scale: float = 1.0
    rotation: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    cutout: float = 0.0


_STANDARD = Ranges(
    flip=True,
    quarter_turns=True,
    scale=1.25,
    rotation=45,
    shift=0.1,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=10,
)

STRENGTHS: dict[Strength, Ranges] = {
    "none": Ranges(),
    "flip": Ranges(flip=True),
    "standard": _STANDARD,
    "strong": replace(
        _STANDARD,
        scale=1.5,
        shift=0.15,
        brightness=0.3,
        contrast=0.3,
        saturation=0.4,
        hue=20,
        blur=0.01,
        noise=0.03,
        cutout=0.4,
    ),
}
"""`standard` is for most runs: a lesion has no upright and no one place, size or light. A full
turn is 45 degrees either way and quarter turns. `strong` goes further and also hides detail:
for few pictures, or long training."""

_LIMITS = {
    "scale": (1, 4),
    "rotation": (0, 180),
    "shift": (0, 0.5),
    "brightness": (0, 1),
    "contrast": (0, 1),
    "saturation": (0, 1),
    "hue": (0, 180),
    "blur": (0, 0.1),
    "noise": (0, 1),
    "cutout": (0, 1),
}


@dataclass(frozen=True)
class AugmentationConfig:
    """Single ranges in place of those of train.augment (none: as it says).

    What a picture gets is drawn evenly from each range, by the seed, the step and its place in
    the batch. Lengths are shares of the picture's side, so that they fit any size.
    """

    flip: bool | None = None
    """Flip left to right with probability 0.5."""
    quarter_turns: bool | None = None
    """Turn by 0, 90, 180 or 270 degrees."""
    scale: float | None = None
    """Enlarge or shrink by up to this factor (1: not)."""
    rotation: float | None = None
    """Turn by up to so many degrees, either way. What comes in from outside is mirrored at the
    border, in image and mask alike."""
    shift: float | None = None
    """Shift by up to this share of the side, along each axis."""
    brightness: float | None = None
    """Multiply all values by a factor from 1 - this to 1 + this."""
    contrast: float | None = None
    """The same of the distance from the picture's mean grey."""
    saturation: float | None = None
    """The same of the distance from each pixel's own grey."""
    hue: float | None = None
    """Turn the hue by up to so many degrees, either way."""
    blur: float | None = None
    """Gaussian blur whose standard deviation is up to this share of the side."""
    noise: float | None = None
    """Noise, alike in the three channels, whose standard deviation is up to this share of the
    full range (255)."""
    cutout: float | None = None
    """Fill a square of up to this share of the side with the picture's mean colour. Its mask
    stays: what is hidden is to be told from what is round it."""

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            allowed = f"from {low} to {high}"
            if value is not None:
                require(low <= value <= high, f"train.augmentation.{name}", value, allowed)

    def ranges(self, strength: Strength) -> Ranges:
        """Those of `strength`, but for what is given here."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        asked = {name: value for name, value in given.items() if value is not None}
        return replace(STRENGTHS[strength], **asked)
