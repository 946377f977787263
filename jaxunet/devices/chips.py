"""What the makers publish of a chip: what estimates for one that is not there rest on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator; rates are a second's, sizes are bytes.

    Attributes:
        name: as it is sold.
        clock: cycles of its core, or of each of its multiprocessors.
        flops: its matrix units' peak in bfloat16; a multiplication and its addition count 2.
        memory: of the whole chip.
        memory_rate: to and from that memory.
        link_rate: out of the chip, over all of its links to others together.
        source: where these figures stand.
    """

    name: str
    clock: float
    flops: float
    memory: int
    memory_rate: float
    link_rate: float
    source: str


_CLOUD = "https://docs.cloud.google.com/tpu/docs"

TPUS = {
    "v5e": Chip("TPU v5e", 1.5e9, 197e12, 16 * 2**30, 819e9, 200e9, f"{_CLOUD}/v5e"),
    "v5p": Chip("TPU v5p", 1.75e9, 459e12, 95 * 2**30, 2765e9, 600e9, f"{_CLOUD}/v5p"),
    "v6e": Chip("TPU v6e", 1.75e9, 918e12, 32 * 2**30, 1638e9, 400e9, f"{_CLOUD}/v6e"),
}
"""By the first part of a topology's name. Links: half of what those pages call bidirectional.

Clocks are not there, but follow from the peak, which is the clock times twice the multiply-adds
of a cycle: 4 matrix units of 128x128 on a v5e (1.5 GHz in "How to Scale Your Model", too,
https://jax-ml.github.io/scaling-book/tpus), two cores of 4 such on a v5p. A v6e's page counts
two units of 256x256, where an earlier one counted four. The peak and the compiler, which lets a
cycle of a large product do more than two could, fit four, and so 1.75 GHz.
"""

H100 = Chip(
    *("NVIDIA H100 SXM", 1.98e9, 989e12, 80 * 10**9, 3350e9, 450e9),
    source="https://www.nvidia.com/en-us/data-center/h100/",
)
"""Without sparsity; the link, too, is half of what that page gives for both ways. The clock is
the boost of XLA's own description of the card."""
H100_CONVOLUTION_SHARE = 2 / 3
"""Of the peak that convolutions reach: 13.5 ms a training step of the reference design in
bfloat16, batches of 32, as measured (experiments/results/gpu-forms-bfloat16.json)."""
