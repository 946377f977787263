"""Several processes as one run: how they meet, what process 0 does for all, how they fail.

Every process runs the same program. Process 0 alone reads and writes the run directory; the
others get what it read, or its error, through JAX's coordination service (for small JSON)
or the devices (for arrays). A process that fails tells the others, which stop too.

With one process every function here does the plain thing and nothing else.
"""

import itertools
import json
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxunet import errors
from jaxunet.errors import ConfigError, JaxUNetError, RunError
from jaxunet.provenance import disagreement

T = TypeVar("T")

HEARTBEAT_TIMEOUT = 30  # seconds of silence after which a process counts as dead
MEETING_TIMEOUT = 300  # seconds that the first process to start waits for the last
POLL = 1.0  # seconds between two looks at whether another process has failed
GRACE = 20.0  # seconds that process 0 has to finish a checkpoint when another has failed
LINGER = 3 * POLL  # seconds that a failed process 0, who serves the others, stays for them
PATIENCE = 5.0  # seconds of waiting for process 0 after which a process says so

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

_FAILED = "jaxunet/failed"
_turns = itertools.count()
_finished = threading.Event()


def initialize() -> None:
    """Join the other processes; before anything touches a device.

    JAX finds them by itself under Slurm, Open MPI, Kubernetes and on Cloud TPU. Elsewhere
    the environment names them: the address of process 0 (`host:port`), their number, and
    which of them this one is.

    Raises:
        ConfigError: nothing says who the others are, what says so is malformed, or they
            have different numbers of devices. (When they don't come, JAX ends the process.)
    """
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    found = ", ".join(f"{name}={value}" for name, value in given.items())
    address, count, index = given[ADDRESS], _integer(COUNT), _integer(INDEX)
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"{ADDRESS} is {address!r}, but must be host:port.")
    # It would take SIGTERM for itself; `jaxunet.runs.stopping` agrees on stops.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(
        PATIENCE,
        lambda: print(
            f"waiting up to {MEETING_TIMEOUT} s for the other processes to start ({found})",
            file=sys.stderr,
        ),
    )
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            initialization_timeout=MEETING_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "--distributed could not join the other processes: "
            f"{str(error).splitlines()[0]} Start it under Slurm, Open MPI, Kubernetes or on "
            f"Cloud TPU, or set {ADDRESS} (host:port of process 0), {COUNT} and {INDEX}; "
            f"found {found}."
        ) from error
    finally:
        waiting.cancel()
    threading.Thread(target=_watch, daemon=True).start()
    if jax.device_count() != jax.local_device_count() * jax.process_count():
        raise ConfigError(
            f"Process {jax.process_index()} has {jax.local_device_count()} of "
            f"{jax.device_count()} devices; all {jax.process_count()} processes must have the "
            "same number."
        )
    # Opens the connections between devices now: later, when one process takes longer to
    # compile, the others would wait in vain (Gloo gives up after 30 s).
    multihost_utils.sync_global_devices("jaxunet")


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number.") from None


def is_joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this is process 0, which alone writes and prints."""
    return not is_joined() or jax.process_index() == 0


def on_main(function: Callable[[], Any], doing: str) -> Any:
    """What `function` gives on process 0, on every process; the others wait.

    Args:
        function: gives something that JSON can hold. A `JaxUNetError` that it raises is
            raised everywhere.
        doing: what process 0 does, for the others to say when it takes long.
    """
    if not is_joined():
        return function()
    key = f"jaxunet/turn-{next(_turns)}"
    if not is_main():
        return _take_over(json.loads(_await(key, doing)))
    try:
        result = {"value": function()}
    except JaxUNetError as error:
        _client().key_value_set(key, json.dumps({"error": [type(error).__name__, str(error)]}))
        raise
    _client().key_value_set(key, json.dumps(result))
    return result["value"]


def same_everywhere(record: dict[str, Any], ignore: Collection[str] = ()) -> None:
    """Make sure that every process has the same `record`.

    Args:
        record: what JSON can hold.
        ignore: as for `jaxunet.provenance.disagreement`.

    Raises:
        RunError: one differs from process 0; on every process, with the same message.
    """
    if not is_joined():
        return
    key, me = f"jaxunet/turn-{next(_turns)}", jax.process_index()
    _client().key_value_set(f"{key}/{me}", json.dumps([platform.node(), record]))
    hosts = [
        json.loads(_await(f"{key}/{each}", "getting ready", of=each))
        for each in range(jax.process_count())
    ]
    (main_node, main_record), *others = hosts
    for index, (node, other) in enumerate(others, start=1):
        said = disagreement(
            main_record,
            other,
            recorded=f"Process 0 (on {main_node})",
            there=f"process {index} (on {node})",
            ignore=ignore,
        )
        if said:
            raise RunError(
                f"{said} All processes need the same data, configuration and code: bring "
                f"process {index}'s to the state of process 0's."
            )


def main_first(function: Callable[[], T], doing: str) -> T:
    """`function` on process 0 and, when that is done, on every other one.

    What process 0 leaves on a disk that all share, the others find; on disks of their own
    they do the same for themselves.
    """
    mine: list[T] = []

    def first() -> None:
        mine.append(function())

    on_main(first, doing)
    return mine[0] if mine else function()


def from_main(tree: Any) -> Any:
    """Process 0's host arrays, bit for bit, in place of every process's own."""
    if not is_joined():
        return tree
    # Sent as a sum with zeros, which would turn -0.0 into 0.0: so as bytes.
    raw = jax.tree.map(lambda x: np.frombuffer(np.asarray(x).tobytes(), np.uint8), tree)
    sent = multihost_utils.broadcast_one_to_all(raw)
    return jax.tree.map(
        lambda x, b: np.frombuffer(b.tobytes(), x.dtype).reshape(x.shape).copy(), tree, sent
    )


def fail(error: BaseException, status: int) -> NoReturn:
    """Say why this process stops, let the others know, and end it with `status`.

    It ends at once: an orderly exit would wait for processes that wait for this one.
    """
    first = _failure()
    if first is not None:
        _say(f"stops, because process {first[0]} failed: {first[1]}")
    elif isinstance(error, JaxUNetError):
        _say(f"error: {error}")
    elif _is_loss(error):
        error = RunError(
            "lost the others in the middle of a computation: one of them was killed or "
            "cannot be reached. Start all of them again with --resume. "
            f"({str(error).splitlines()[0][:200]})"
        )
        _say(f"error: {error}")
    else:
        traceback.print_exception(error)
    if first is None:
        try:
            text = str(error) or type(error).__name__
            _client().key_value_set(_FAILED, json.dumps([jax.process_index(), text]))
        except jax.errors.JaxRuntimeError:
            pass  # Another was first, or process 0 is gone, which ends the others by itself.
    if is_main():
        time.sleep(LINGER)
    _leave(status)


def finish() -> None:
    """Wait for process 0 to finish its part; after this a process may end by itself."""
    on_main(lambda: None, "finishing")
    _finished.set()


def _client() -> Any:
    # JAX has no public way to its key-value store; Orbax takes this one too.
    from jax._src.distributed import global_state

    return global_state.client


def _await(key: str, doing: str, of: int = 0) -> str:
    wait = PATIENCE
    while True:
        try:
            return _client().blocking_key_value_get(key, int(1000 * wait))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if wait == PATIENCE:
            _say(f"waits for process {of}, which is {doing}.")
        wait = 60.0


def _take_over(result: dict[str, Any]) -> Any:
    if "error" in result:
        name, message = result["error"]
        raise getattr(errors, name, JaxUNetError)(message)
    return result["value"]


def _failure() -> tuple[int, str] | None:
    """Which process failed first, and why; None if none has."""
    try:
        return tuple(json.loads(_client().key_value_try_get(_FAILED)))
    except jax.errors.JaxRuntimeError:
        return None


def _watch() -> None:
    """End this process when another has failed, whatever it is waiting for."""
    while not _finished.wait(POLL):
        failure = _failure()
        if failure is None or failure[0] == jax.process_index():
            continue
        # Others may fail for the same reason; process 0 may be in the middle of a save.
        if is_main() and _finished.wait(GRACE):
            return
        _say(f"stops, because process {failure[0]} failed: {failure[1]}")
        _leave(1)


def _is_loss(error: BaseException) -> bool:
    """Whether `error` says that a computation with the other processes broke off.

    JAX raises it as a `JaxRuntimeError` where a result is awaited, but as a `ValueError` with
    the same text where a computation is started.
    """
    broken = r"[A-Z_]+: .*(?i:gloo|connection)|UNAVAILABLE: |DEADLINE_EXCEEDED: "
    raised = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return raised and re.match(broken, str(error)) is not None


def _say(message: str) -> None:
    print(f"process {jax.process_index()} of {jax.process_count()} {message}", file=sys.stderr)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
