"""What a row of the table is: an input that is broken, and what comes of it."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from ground import World


@dataclass(frozen=True)
class Refused:
    """The script ends with a paragraph that matches `message`, and writes nothing."""

    message: str
    status: int = 1
    """2 for what the parser of the command line refuses, as is the custom there."""
    leaves: str | None = None
    """Folder in which there may be something afterwards: a run that had begun, a download."""


@dataclass(frozen=True)
class Taken:
    """The script does its work, and `check` finds what the documentation says."""

    check: Callable[[World, str], None]
    """Gets the world and what the script printed."""
    status: int = 0
    """1 where the script did what it could and says what it could not."""


@dataclass(frozen=True)
class Row:
    name: str
    command: Callable[[World], list[object]]
    """Breaks something in a sound world, and gives what the user then types."""
    outcome: Refused | Taken
    circumstance: Callable[[World], AbstractContextManager[object]] = lambda world: (
        contextlib.nullcontext()
    )
    """What the system does while the script runs, where a file cannot tell it."""


def prepared_as(
    key: str, image: np.ndarray | None = None, mask: np.ndarray | None = None, **changes: object
) -> Taken:
    """The pair `key` of own/ is stored with these pixels (None: whatever they are)."""

    def check(world: World, output: str) -> None:
        found_image, found_mask = world.example(key, **changes)
        if image is not None:
            np.testing.assert_array_equal(found_image, image)
        if mask is not None:
            np.testing.assert_array_equal(found_mask, mask)

    return Taken(check)
