"""A run watched from the process that trains it: its log lines, as they are written."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxunet.runs.record import read_metrics

SECONDS = 2.0  # between looks at the log

Lines = list[dict[str, Any]]


@contextmanager
def follow(
    run: Path | str, draw: Callable[[Lines], None], *, every: float = SECONDS
) -> Iterator[None]:
    """Call `draw` with all lines of the log of `run` whenever there are new ones, while the
    block trains, and once more at its end. In a notebook, a curve that grows:

    >>> with follow("runs/a", draw):
    ...     jaxunet.train(config, data, "runs/a", show_progress=False)

    Training stays in the thread that it is called in, where signals reach it: to interrupt the
    notebook's kernel saves the run and stops it. `draw` is called in a thread of its own, but
    for the last time.

    Args:
        run: run directory, which need not be there yet.
        draw: takes the objects of `metrics.jsonl`, in order.
        every: seconds between looks at the log.

    Raises:
        Exception: what `draw` raised, once the block is through; it is not called again.
    """
    log, over = Path(run) / "metrics.jsonl", threading.Event()
    drawn, failed = Lines(), list[Exception]()

    def look() -> None:
        nonlocal drawn
        lines = read_metrics(log)
        if lines != drawn:  # a resumed run's may be fewer
            draw(lines)
            drawn = lines

    def watch() -> None:
        while not over.wait(every):
            try:
                look()
            except Exception as error:  # raised below: nobody hears a thread
                failed.append(error)
                return

    watcher = threading.Thread(target=watch, name="follow", daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        over.set()
        watcher.join()
        if not failed:
            with suppress(Exception):  # the block's is to be heard
                look()
        raise
    over.set()
    watcher.join()
    if failed:
        raise failed[0]
    look()
