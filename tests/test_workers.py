import os
import signal
import subprocess
import sys
import time

import pytest

from jaxunet.errors import RunError
from jaxunet.workers import Workers

SCRIPT = """
import os, signal, sys
from jaxunet.workers import Workers

def work(batch):
    return os.getpid()

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    workers = Workers(work, 2)
    print("started", flush=True)
    for line in sys.stdin:
        print(workers(0), workers(1), flush=True)
"""


def read(batch):
    """What a worker does for a number: gives it back, or dies of it."""
    if batch == -1:
        raise ValueError("of the third row")
    if batch == -2:
        os._exit(3)
    if batch < -2:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-batch])
        os.kill(os.getpid(), -batch)
    return {"batch": batch}


def start(tmp_path, *before):
    """The script at the head of a process group of its own, its workers just started."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    process = subprocess.Popen(
        [*before, sys.executable, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n", process.stderr.read()
    return process


def ask(process):
    """The process ids of both workers."""
    process.stdin.write("\n")
    process.stdin.flush()
    return [int(word) for word in process.stdout.readline().split()]


def finish(process):
    """Let it end by itself: status 0 and not a word."""
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_workers_leave_signals_to_the_group_to_the_run(tmp_path):
    from jaxunet.runs.stopping import (
        STOP_SIGNALS,  # and with it JAX, which workers can do without
    )

    process = start(tmp_path)
    for number in STOP_SIGNALS:  # while they start,
        os.killpg(process.pid, number)
    workers = ask(process)
    assert len(set(workers)) == 2
    for number in STOP_SIGNALS:  # and when they run
        os.killpg(process.pid, number)
    assert ask(process) == workers
    finish(process)


@pytest.mark.parametrize("started", [False, True])
def test_workers_end_with_a_run_that_is_killed(started, tmp_path):
    process = start(tmp_path)
    if started:
        ask(process)
    process.kill()
    process.wait()
    # Only what runs in the group can still be signalled: workers, and Python's tracker.
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_need_no_shared_memory(tmp_path):
    mount = "mount -t tmpfs -o ro tmpfs /dev/shm"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    process = start(tmp_path, *unshare, f'{mount} && exec "$@"', "sh")
    assert len(ask(process)) == 2
    finish(process)


def test_what_a_worker_raises_is_raised_and_its_death_is_named():
    workers = Workers(read, 1)
    try:
        assert workers(5) == {"batch": 5}
        with pytest.raises(ValueError, match="of the third row") as raised:
            workers(-1)
        assert "in read" in raised.value.__notes__[0]
        assert workers(6) == {"batch": 6}
    finally:
        workers.close()
    assert not workers._processes[0].is_alive()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (-2, "ended with status 3"),
        (-signal.SIGSEGV, "died of SIGSEGV"),
        (-signal.SIGKILL, "was killed, most likely because memory ran out"),
    ],
)
def test_the_death_of_a_worker_is_named_with_its_likely_cause(batch, message):
    workers = Workers(read, 1)
    try:
        with pytest.raises(RunError, match=rf"{message}.*data\.workers.*--resume"):
            workers(batch)
    finally:
        workers.close()
