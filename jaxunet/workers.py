"""Processes that read batches, for `data.workers`.

Grain has workers of its own (`mp_prefetch`). They die of a Ctrl-C that is meant for the run,
live on when the run is killed, and hand arrays over in /dev/shm, which is small in
containers and where a kill leaves them. Here Grain's threads ask plain processes, over a pipe
for each: a worker ends when its pipe does, and that is when the run ends, however it ends.
"""

import atexit
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any

from jaxunet.errors import RunError

Read = Callable[[int], Any]


def usable_cores() -> int:
    """CPU cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Calls `read` in `count` other processes; as many threads may call at once."""

    def __init__(self, read: Read, count: int):
        """Args: read: picklable, and so is what it returns or raises."""
        self._idle: SimpleQueue[tuple[SpawnProcess, Connection]] = SimpleQueue()
        self._processes: list[SpawnProcess] = []
        atexit.register(self.close)  # Before multiprocessing's own, which would wait for them.
        spawn = multiprocessing.get_context("spawn")
        with _signals_held():
            resource_tracker.ensure_running()  # This one starts with the first process, and
        with _signals_held():  # Python then lets go of two signals that were held.
            for each in range(count):
                ours, theirs = spawn.Pipe()
                process = spawn.Process(
                    target=_work, args=(read, theirs), name=f"worker-{each}", daemon=True
                )
                process.start()
                theirs.close()  # so that a read fails when the worker has died
                self._processes.append(process)
                self._idle.put((process, ours))

    def __call__(self, batch: int) -> Any:
        """What `read(batch)` gives or raises in a worker.

        Raises:
            RunError: the worker died.
        """
        process, pipe = worker = self._idle.get()
        try:
            pipe.send(batch)
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            raise RunError(_death(process)) from None
        finally:
            self._idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the workers, whatever they are doing: they only read."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _work(read: Read, pipe: Connection) -> None:
    """Answer until the pipe ends."""
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_answer(read, pipe.recv()))


def _answer(read: Read, batch: int) -> Any:
    try:
        return read(batch)
    except Exception as error:  # whatever it is, the parent raises it
        error.add_note("In a worker process:\n" + traceback.format_exc())
        return error


@contextmanager
def _signals_held() -> Iterator[None]:
    """No signal reaches a process that starts meanwhile, from its first moment to its last.

    A terminal and a scheduler send them to the whole group, but they are meant for the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(process: SpawnProcess) -> str:
    process.join(10)
    status = process.exitcode or 0
    if status == -signal.SIGKILL:
        why = (
            "was killed, most likely because memory ran out (`dmesg`, or the scheduler's or "
            "container's report, says so). Use fewer data.workers, or ask for more memory"
        )
    elif status < 0:
        why = f"died of {signal.Signals(-status).name}. Use data.workers 0"
    else:
        why = (
            f"ended with status {status}; its own words are above. (A script that trains with "
            "workers needs `if __name__ == '__main__':`.) Use data.workers 0"
        )
    return (
        f"Worker process {process.pid}, one of data.workers, {why}; a run goes on from its "
        "last checkpoint with --resume."
    )
