"""Dermoscopy-like pictures drawn from a seed, with their exact masks.

They are for trying the code out, never for clinical use. The recipe follows what real
dermoscopy shows: skin of many tones, an irregular lesion of several colours whose border is
sharp or soft, and in front of both the usual nuisances (hairs, gel bubbles, ruler marks, a
dark vignette, blur, noise). Lengths are fractions of the picture's side, so that one seed
gives the same picture at any size, up to noise.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter

from jaxunet.data.sampler import generator

VERSION = 1
"""Raise it when the same seed gives other pictures, so that they are prepared again."""

SPLITS = ("train", "validation", "test")

# From fair to dark; a picture's skin lies between two neighbours.
_SKIN = np.array(
    [[236, 205, 190], [226, 184, 160], [208, 160, 132], [178, 128, 100], [134, 92, 70]],
    dtype=np.float32,
)
# Relative to the skin: light brown, brown, dark brown, red, blue-grey.
_PIGMENT = np.array(
    [[0.76, 0.64, 0.54], [0.58, 0.44, 0.36], [0.36, 0.27, 0.25], [0.82, 0.50, 0.50],
     [0.50, 0.53, 0.62]],
    dtype=np.float32,
)  # fmt: skip


def draw(
    seed: int, split: str, index: int, size: int
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], UInt8[np.ndarray, "{size} {size} 1"]]:
    """Draw one picture and its mask.

    Args:
        seed: of the whole dataset.
        split: one of `SPLITS`.
        index: of the picture in its split; pictures don't depend on how many there are.
        size: side in pixels.

    Returns:
        uint8 image `[size, size, 3]` and uint8 mask `[size, size, 1]` of 0 and 255.
    """
    rng = generator(seed, SPLITS.index(split), index)
    y, x = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2, indexing="ij")
    skin = _skin(rng, size)
    lesion = _outline(rng, x, y)
    image = _paint_lesion(rng, skin, lesion)
    # Layers come in the order in which they lie between the skin and the lens.
    for layer, probability in ((_hairs, 0.6), (_ruler, 0.2), (_bubbles, 0.35)):
        if rng.random() < probability:
            image = layer(rng, image)
    image = _light(rng, image, x, y)
    image = _lens(rng, image)
    mask = np.where(lesion.depth > 0, 255, 0).astype(np.uint8)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), mask[:, :, np.newaxis]


@dataclass(frozen=True)
class _Lesion:
    depth: np.ndarray
    """Distance inside the border as a fraction of the picture, negative outside."""
    radius: float


def _clouds(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise with about `cells` bumps across: float32 `[size, size]`, variance ~1."""
    grid = rng.normal(size=(cells + 3, cells + 3)).astype(np.float32)
    # A margin of cells is cut away, where the interpolation runs out of neighbours.
    inside = (1.5, 1.5, 1.5 + cells, 1.5 + cells)
    wide = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC, inside)
    return np.asarray(wide) * 1.3


def _skin(rng: np.random.Generator, size: int) -> np.ndarray:
    tone = rng.beta(1.2, 2.0) * (len(_SKIN) - 1)
    low = min(int(tone), len(_SKIN) - 2)
    colour = _SKIN[low] + (tone - low) * (_SKIN[low + 1] - _SKIN[low])
    colour = colour * rng.uniform(0.97, 1.03, size=3).astype(np.float32)
    mottle = 0.020 * _clouds(rng, size, 4) + 0.014 * _clouds(rng, size, 14)
    lines = 0.012 * _clouds(rng, size, 48)
    flush = rng.uniform(0, 0.03) * _clouds(rng, size, 3)
    skin = colour * (1 + mottle + lines)[:, :, np.newaxis]
    skin[:, :, 1:] *= 1 - flush[:, :, np.newaxis]
    return skin


def _outline(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> _Lesion:
    """A wavy ellipse: Fourier terms in the angle, then a warp that breaks the symmetry."""
    size = len(x)
    radius = float(np.exp(rng.uniform(np.log(0.11), np.log(0.40))))
    room = max(0.02, 0.42 - radius)
    centre_x, centre_y = 0.5 + rng.uniform(-room, room, size=2)
    turn, flat = rng.uniform(0, np.pi), rng.uniform(0.62, 1.0)
    ragged = rng.uniform(0.3, 1.0)
    warp = 0.16 * radius * ragged
    dx = x - centre_x + warp * _clouds(rng, size, 5)
    dy = y - centre_y + warp * _clouds(rng, size, 5)
    along = (np.cos(turn) * dx + np.sin(turn) * dy) * np.sqrt(flat)
    across = (np.cos(turn) * dy - np.sin(turn) * dx) / np.sqrt(flat)
    distance, angle = np.hypot(along, across), np.arctan2(across, along)
    border = np.ones_like(distance)
    for wave in range(2, 9):
        amplitude = 0.30 * ragged * rng.normal() / wave**1.2
        border += amplitude * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    # A deep notch would cut the lesion in two, or leave nothing of it.
    border = np.maximum(border, 0.45)
    fine = 0.012 * ragged * _clouds(rng, size, 24)
    return _Lesion((radius * border - distance) + radius * fine, radius)


def _paint_lesion(rng: np.random.Generator, skin: np.ndarray, lesion: _Lesion) -> np.ndarray:
    size, radius, depth = len(skin), lesion.radius, lesion.depth
    kinds = rng.permutation(len(_PIGMENT))[: rng.integers(1, 5)]
    # Most lesions are brown; red or blue alone is rare.
    kinds = np.concatenate([[rng.integers(0, 3)], kinds[1:]])
    pigment = np.broadcast_to(_PIGMENT[kinds[0]], skin.shape)
    for kind in kinds[1:]:
        patch = _clouds(rng, size, int(rng.integers(3, 8))) - rng.uniform(0.0, 0.9)
        cover = _step(patch, rng.uniform(0.15, 0.5))[:, :, np.newaxis]
        pigment = pigment + cover * (_PIGMENT[kind] - pigment)
    network = _clouds(rng, size, int(rng.integers(26, 44)))
    globules = np.maximum(_clouds(rng, size, int(rng.integers(16, 28))) - 1.0, 0)
    texture = 1 + rng.uniform(0.01, 0.07) * network - rng.uniform(0, 0.25) * globules
    darker_core = 1 - rng.uniform(0.0, 0.30) * np.clip(depth / radius, 0, 1)
    texture = np.clip(texture * darker_core, 0.4, 1.3)[:, :, np.newaxis]
    strength = rng.uniform(0.45, 1.0)
    colour = skin * (1 + strength * (pigment * texture - 1))
    if rng.random() < 0.2:  # regression: scar-like pale areas inside
        inside = _step(depth - 0.25 * radius, 0.15 * radius)
        pale = (inside * _step(_clouds(rng, size, 5) - 0.9, 0.3))[:, :, np.newaxis]
        colour = colour + 0.7 * pale * (skin * 1.04 - colour)
    softness = radius * np.exp(rng.uniform(np.log(0.015), np.log(0.12)))
    alpha = _step(depth, softness)[:, :, np.newaxis]
    halo = rng.uniform(0, 0.10) * _step(depth + 0.1 * radius, 0.1 * radius)[:, :, np.newaxis]
    reddened = skin * (1 - halo * np.array([0.2, 1.0, 0.9], dtype=np.float32))
    return reddened + alpha * (colour - reddened)


def _step(value: np.ndarray, width: float) -> np.ndarray:
    """A soft step from 0 to 1 at 0, about `width` to either side."""
    return 0.5 + 0.5 * np.tanh(value / width)


def _overlay(image: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return image + cover[:, :, np.newaxis] * (colour - image)


class _Canvas:
    """A greyscale layer to draw on in fractions of the side, antialiased by oversampling."""

    def __init__(self, size: int) -> None:
        self.size, self.scale = size, 3 * size
        self.image = Image.new("L", (self.scale, self.scale))
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points: np.ndarray, width: float, level: float = 1.0) -> None:
        path = [(float(px), float(py)) for px, py in points * self.scale]
        self.pen.line(path, int(255 * level), max(1, round(width * self.scale)), "curve")

    def ring(self, x: float, y: float, radius: float, width: float, level: float) -> None:
        box = [(v * self.scale) for v in (x - radius, y - radius, x + radius, y + radius)]
        fill = int(255 * level)
        if width >= radius:
            self.pen.ellipse(box, fill=fill)
        else:
            self.pen.ellipse(box, outline=fill, width=max(1, round(width * self.scale)))

    def cover(self) -> np.ndarray:
        """float32 `[size, size]` in [0, 1]."""
        return np.asarray(self.image.reduce(3), dtype=np.float32) / 255


def _hairs(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    canvas = _Canvas(len(image))
    colour = rng.uniform(0.6, 1.3) * np.array([52, 36, 28], dtype=np.float32)
    combed, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 1.5)
    t = np.linspace(0, 1, 16)[:, np.newaxis]
    for _ in range(int(rng.geometric(0.12)) + 1):
        root = rng.uniform(-0.1, 1.1, size=2)
        direction = combed + spread * rng.normal()
        tip = root + rng.uniform(0.25, 0.9) * np.array([np.cos(direction), np.sin(direction)])
        bend = (root + tip) / 2 + rng.normal(size=2) * 0.10
        curve = (1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t**2 * tip
        canvas.line(curve, rng.uniform(0.003, 0.008), rng.uniform(0.5, 0.95))
    return _overlay(image, canvas.cover(), colour)


def _ruler(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    canvas = _Canvas(len(image))
    edge = rng.uniform(0.03, 0.12)
    spacing = rng.uniform(0.025, 0.05)
    for number, position in enumerate(np.arange(rng.uniform(0, spacing), 1, spacing)):
        length = 0.06 if number % 5 == 0 else 0.03
        canvas.line(np.array([[edge, position], [edge + length, position]]), 0.005, 0.85)
    quarter_turns = int(rng.integers(4))
    cover = np.rot90(canvas.cover(), quarter_turns)
    return _overlay(image, cover, np.array([38, 36, 40], dtype=np.float32))


def _bubbles(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    rims, glints = _Canvas(len(image)), _Canvas(len(image))
    for _ in range(int(rng.integers(1, 14))):
        x, y = rng.uniform(0, 1, size=2)
        radius = float(np.exp(rng.uniform(np.log(0.008), np.log(0.06))))
        rims.ring(x, y, radius, 0.12 * radius + 0.003, rng.uniform(0.25, 0.6))
        shift = -0.45 * radius
        glints.ring(x + shift, y + shift, 0.22 * radius, radius, rng.uniform(0.5, 0.95))
    white = np.array([250, 248, 246], dtype=np.float32)
    return _overlay(_overlay(image, rims.cover(), white * 0.92), glints.cover(), white)


def _light(
    rng: np.random.Generator, image: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Uneven lighting, a colour cast, and the dark surround of the lens."""
    direction, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.16)
    gradient = 1 + slope * ((x - 0.5) * np.cos(direction) + (y - 0.5) * np.sin(direction))
    from_centre = np.hypot(x - 0.5, y - 0.5)
    gradient = gradient * (1 - rng.uniform(0, 0.35) * (from_centre / 0.7) ** 3)
    cast = rng.uniform(0.96, 1.04, size=3).astype(np.float32)
    lit = image * gradient[:, :, np.newaxis] * cast * rng.uniform(0.88, 1.08)
    if rng.random() < 0.25:
        opening = rng.uniform(0.53, 0.66)
        surround = _step(from_centre - opening, rng.uniform(0.004, 0.03))
        lit = lit * (1 - 0.97 * surround[:, :, np.newaxis])
    return lit


def _lens(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blur, then sensor noise."""
    size = len(image)
    focus = rng.uniform(0.0, 0.006) * size
    eight_bit = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    blurred = np.asarray(eight_bit.filter(ImageFilter.GaussianBlur(focus)), dtype=np.float32)
    sigma = rng.uniform(1.0, 5.0)
    return blurred + sigma * rng.standard_normal(image.shape, dtype=np.float32)
