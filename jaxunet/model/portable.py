"""Programs that leave this machine: traced without what only it has.

Our own loops for a CPU are code of this process; an exported program can't hold them. Inside
`portable()` operations are traced in XLA's forms instead, the plainest on a CPU and a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_portable = ContextVar("portable", default=False)


@contextmanager
def portable() -> Iterator[None]:
    """What is traced inside can be exported; batch sizes may be symbolic."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def is_portable() -> bool:
    return _portable.get()
