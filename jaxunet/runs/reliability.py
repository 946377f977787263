"""Predicted probability against the share of lesion, drawn."""

from pathlib import Path
from typing import Any

from jaxunet.runs.canvas import BLUE, Figure, finish, save, with_own_settings


@with_own_settings
def draw(calibration: dict[str, Any], path: Path, title: str) -> None:
    """Draw the bins of `jaxunet.learning.calibration.described` to the PNG file `path`.

    Above, mean probability and share of lesion of each bin, on the diagonal where they agree;
    below, how many pixels it holds.
    """
    filled = [each for each in calibration["bins"] if each["pixels"]]
    figure = Figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    above.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    above.plot(
        [each["mean_probability"] for each in filled],
        [each["lesion_share"] for each in filled],
        "o-",
        color=BLUE,
    )
    error = calibration["expected_calibration_error"]
    finish(above, f"{title}\nexpected calibration error {error:.4f}", "", "share of lesion")
    above.set(xlim=(0, 1), ylim=(0, 1))
    below.bar(
        [each["from"] for each in filled],
        [each["pixels"] for each in filled],
        [each["to"] - each["from"] for each in filled],
        align="edge",
        color=BLUE,
    )
    below.set_yscale("log")
    finish(below, "", "predicted probability", "pixels")
    save(figure, path)
