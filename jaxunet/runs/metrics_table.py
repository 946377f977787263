"""metrics.csv: the lines of metrics.jsonl as a flat table, for spreadsheets and pandas."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxunet.files import write_atomically

COLUMNS = (
    *("step", "epoch", "split", "wall_seconds"),
    *("loss", "epoch_mean_loss", "grad_norm", "learning_rate"),
    *("examples_per_second", "peak_device_bytes", "peak_process_bytes"),
    *("dice", "iou", "threshold_jaccard", "accuracy", "sensitivity", "specificity"),
)
"""Of every table, in this order."""


def flat(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl by column: what is in `values` and `measured` beside the rest."""
    cells: dict[str, Any] = {}
    for name, value in line.items():
        cells |= value if isinstance(value, dict) else {name: value}
    return cells


class MetricsTable:
    """Written anew from the lines that are kept, and then row by row as the log is."""

    def __init__(self, path: Path, lines: Sequence[dict[str, Any]]):
        """Args: lines: that stand in metrics.jsonl. What else they have gets a column, too."""
        rows = [flat(line) for line in lines]
        self._columns = tuple(
            dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        )
        head = dict(zip(self._columns, self._columns, strict=True))
        write_atomically(path, self._text([head, *rows]))
        self._file = path.open("a", encoding="utf-8", newline="")

    def write(self, line: dict[str, Any]) -> None:
        """Raises: ValueError: a value has no column."""
        self._file.write(self._text([flat(line)]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _text(self, rows: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO()  # so that a row is written at once
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()
