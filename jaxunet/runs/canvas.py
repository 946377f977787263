"""What every figure is drawn on; the one file that imports matplotlib.

Figures are `Figure` objects of their own, never pyplot's, drawn with matplotlib's own
settings whatever `matplotlibrc` says, and by Agg whatever `MPLBACKEND` says: that needs no
display, no TeX and no notebook.
"""

import contextlib
import functools
import io
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)):
    # A backend that is not there, such as a notebook's elsewhere, would end the import.
    import matplotlib

    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):  # for the caller's own figures, where it is there
        matplotlib.rcParams["backend"] = backend
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxunet.files import write_atomically

__all__ = [
    "Axes",
    "ConstrainedLayoutEngine",
    "Figure",
    "Line2D",
    "MaxNLocator",
    "finish",
    "save",
    "to_rgb",
    "with_own_settings",
]

# Okabe and Ito's palette, told apart under every common colour blindness.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, BLACK, SKY, YELLOW = "#E69F00", "#000000", "#56B4E9", "#F0E442"

P = ParamSpec("P")

_ONE_AT_A_TIME = threading.RLock()  # matplotlib, and its settings, are no thread's own


def with_own_settings(draw: Callable[P, None]) -> Callable[P, None]:
    """`draw` under matplotlib's own settings, not the user's: these could need TeX, say."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        with _ONE_AT_A_TIME, matplotlib.style.context("default"):
            draw(*args, **kwargs)

    return drawn


def finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Titles, a faint grid, and the legend if something has a label."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def save(figure: Figure, path: Path) -> None:
    """Write the figure to the PNG file `path`; its folder is made."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())
