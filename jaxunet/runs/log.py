"""What a run logs while it trains: metrics.jsonl, metrics.csv, TensorBoard's event files."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxunet.errors import RunError
from jaxunet.files import why, write_atomically
from jaxunet.runs.metrics_table import MetricsTable
from jaxunet.runs.record import read_metrics
from jaxunet.runs.wandb_log import WandbLog


class MetricsLog:
    """Appends to metrics.jsonl, its table metrics.csv, and TensorBoard's event files."""

    def __init__(self, run: Path, *, keep_lines: int, step: int, wandb: WandbLog | None = None):
        """Go on at `step` after `keep_lines` lines; a killed run's later ones are dropped.

        Args:
            wandb: gets the lines, too, and is closed with the log.

        Raises:
            RunError: the log cannot be written to.
        """
        self._folder, path, self._wandb = run, run / "metrics.jsonl", wandb
        kept = read_metrics(path)[:keep_lines]
        self.lines = len(kept)  # fewer than `keep_lines` if somebody moved the file away
        with ExitStack() as undo, self._writing():
            if wandb is not None:
                undo.callback(wandb.close)
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")
            self._table = MetricsTable(run / "metrics.csv", kept)
            self._events = Events(run / "tensorboard", purge_step=step + 1)
            undo.pop_all()

    def write(
        self,
        *,
        step: int,
        epoch: int,
        split: str,
        values: dict[str, float],
        seconds: float,
        measured: dict[str, float] | None = None,
    ) -> None:
        """Args: values: which a run with the same seed has too; measured: which it has not."""
        line: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "split": split,
            "values": values,
            "wall_seconds": round(seconds, 3),
        }
        if measured:
            line["measured"] = measured
        named = {f"{split}/{k}": v for k, v in (values | (measured or {})).items()}
        with self._writing():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._table.write(line)
            for name, value in named.items():
                self._events.write(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, named)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"The log in {self._folder} (metrics.jsonl, metrics.csv, tensorboard/) cannot "
                f"be written to: {why(error, self._folder)} What was saved before is whole. "
                "Once that is mended, go on with --resume."
            ) from error

    def close(self) -> None:
        # On a full disk even this fails; what was flushed before is all there is.
        for file in (self._file, self._table, self._events):
            with suppress(OSError):
                file.close()
        if self._wandb is not None:
            self._wandb.close()


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps tensorboardX from importing PyTorch, two seconds for graphs that nobody draws.

    Meanwhile nothing else can import it either.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # None: "cannot be found"
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


class Events:
    """Scalars for TensorBoard.

    Written here and now: tensorboardX's `SummaryWriter` does so in a thread, whose errors
    nobody hears.
    """

    FLUSH_SECONDS = 10.0

    def __init__(self, folder: Path, *, purge_step: int):
        """Go on in `folder`; TensorBoard drops what older files say from `purge_step` on."""
        with _without_torch():
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        def scalar(name: str, value: float, step: int) -> Any:
            content = summary.scalar(name, value)
            return Event(wall_time=time.time(), step=step, summary=content)

        self._scalar = scalar
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        self._file.write_event(Event(step=purge_step, session_log=start))
        self._flushed = time.monotonic()

    def write(self, name: str, value: float, step: int) -> None:
        self._file.write_event(self._scalar(name, value, step))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()
