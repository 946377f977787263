"""How many values the loops keep in registers at a time, by processor."""

from typing import NamedTuple


class Blocks(NamedTuple):
    """What the loops hold in registers at a time."""

    lanes: int  # output channels: a vector
    pixels: tuple[int, ...]  # of a row, in the convolution: the largest that fits into the row
    channels: int  # input channels, in the kernel's gradient

    def target(self, name: str) -> str:
        """What XLA knows a function by. A program made for other blocks must not find it."""
        return f"{name}.{self.lanes}"


def blocks_for(machine: str, features: dict[str, bool]) -> Blocks | None:
    """What fits into the registers of a processor: 32 (AVX-512, ARM) or 16 (AVX2) vectors."""
    if machine == "x86_64":
        if features.get("avx512f"):
            return Blocks(lanes=16, pixels=(16, 8, 4), channels=8)
        if features.get("avx2") and features.get("fma"):
            return Blocks(lanes=8, pixels=(8, 4), channels=4)
    if machine in ("aarch64", "arm64"):
        return Blocks(lanes=4, pixels=(16, 8, 4), channels=8)
    return None
