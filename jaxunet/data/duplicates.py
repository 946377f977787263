"""Pictures of different splits that look the same: what is scored was then trained on.

A picture's fingerprint is a difference hash: of a thumbnail in grey, whether each pixel is
lighter than its neighbour. It hardly changes when a picture is resized, encoded again, or made
lighter or redder as a whole.

The usual one, 8 x 8 bits of horizontal neighbours, takes a dark spot on pale skin for any
other: of the 2.2 million pairs among 2,100 pictures of ISIC 2018 28 are within 4 bits, and 514
within 8. With 16 x 16 bits of horizontal and 16 x 16 of vertical neighbours 13 pairs are within
64 bits, by eye all of the same lesion, and so are the 4 next; the first that are not differ by
79.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image

from jaxunet.data.sources import Pair
from jaxunet.files import write_json

SIDE = 16
BITS_APART = 64
"""Pictures that differ by no more of their 512 bits are near duplicates."""
NAMED = 3
LIST_FILE = "near_duplicates.json"
"""In a prepared dataset: all pairs, where there are any."""
_AT_ONCE = 256

Bits = UInt64[np.ndarray, "8"]


def fingerprint(image: UInt8[np.ndarray, "height width 3"]) -> Bits:
    """The 512 bits that say how a picture looks."""
    box = Image.Resampling.BOX
    # The gap lets Pillow first average whole blocks, which is faster.
    small = Image.fromarray(image).resize((8 * SIDE, 8 * SIDE), box, reducing_gap=1.0)
    grey = small.convert("L")
    across = np.asarray(grey.resize((SIDE + 1, SIDE), box))
    down = np.asarray(grey.resize((SIDE, SIDE + 1), box))
    lighter = (across[:, 1:] > across[:, :-1], down[1:] > down[:-1])
    return np.packbits(np.stack(lighter)).view(np.uint64)


def alike(
    first: UInt64[np.ndarray, "n 8"], second: UInt64[np.ndarray, "m 8"]
) -> list[tuple[int, int]]:
    """The places of each two fingerprints that differ by at most `BITS_APART` bits."""
    found: list[tuple[int, int]] = []
    for start in range(0, len(first), _AT_ONCE):
        differing = first[start : start + _AT_ONCE, np.newaxis] ^ second
        apart = np.bitwise_count(differing).sum(axis=-1, dtype=np.uint16)
        found += [(start + int(i), int(j)) for i, j in np.argwhere(apart <= BITS_APART)]
    return found


@dataclass
class Looks:
    """How the pictures of a dataset look, noted while they are decoded, in any order."""

    splits: Mapping[str, Sequence[Pair]]
    _bits: dict[str, Bits] = field(default_factory=dict)

    def note(self, pair: Pair, image: UInt8[np.ndarray, "height width 3"]) -> None:
        """Keep a picture's fingerprint; may be called from several threads."""
        self._bits[str(pair)] = fingerprint(image)

    def near_duplicates(self) -> list[tuple[str, str]]:
        """Each two noted pictures of different splits that look the same, as `SPLIT/ID`."""
        noted = {
            split: [pair for pair in pairs if str(pair) in self._bits]
            for split, pairs in self.splits.items()
        }
        found = []
        for (split, pairs), (other, others) in combinations(noted.items(), 2):
            if pairs and others:
                rows = [
                    np.stack([self._bits[str(p)] for p in each]) for each in (pairs, others)
                ]
                for i, j in alike(*rows):
                    found.append((f"{split}/{pairs[i].id}", f"{other}/{others[j].id}"))
        return found

    def write(self, folder: Path) -> None:
        """List the near duplicates in a prepared dataset's folder, if there are any."""
        if found := self.near_duplicates():
            write_json(folder / LIST_FILE, found)


def warning(found: Sequence[Sequence[str]], listed: object) -> str:
    """A sentence that counts near duplicates and names some.

    Args:
        listed: where all are.
    """
    count = "1 pair" if len(found) == 1 else f"{len(found):,} pairs"
    named = ", ".join(" and ".join(pair) for pair in found[:NAMED])
    more = f", and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return (
        f"warning: {count} of pictures in different splits look the same: {named}{more}. "
        "Scores of what was trained on flatter: look at them, and keep each in one split. "
        f"{listed} names all."
    )
