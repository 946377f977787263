"""Writing files so that a kill at any moment costs nothing that was there before, and saying
why a place can't be written to."""

import errno
import itertools
import json
import os
import re
import sys
from pathlib import Path
from threading import get_native_id
from typing import Any
from zlib import crc32

from jaxunet.errors import RunError

_REMEDIES = {
    errno.ENOSPC: "Make space there, or choose another place",
    errno.EDQUOT: "Your quota there is used up: remove something, or choose another place",
    errno.EACCES: "Change its owner or its permissions, or choose another place",
    errno.EPERM: "Change its owner or its permissions, or choose another place",
    errno.EROFS: "It is mounted read-only: choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOTDIR: "Choose another place",
    errno.EEXIST: "Choose another place",
}


def write_atomically(path: Path, contents: bytes | str) -> None:
    """Make `path` hold all of `contents`, or what it held before; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, so that a name that is just not too long can be written.
    temporary = path.with_name(f".{crc32(os.fsencode(path)):08x}-{get_native_id()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def check_writable(folder: Path, name: str = "") -> None:
    """Make `folder` where it is missing, and write in it for a try.

    Args:
        name: what the user calls it, such as `--out`, to begin the message with.

    Raises:
        RunError: it can't be written to; says why and what helps.
    """
    check_encodable(folder, name)
    try:
        trial = folder / f".jaxunet-{os.getpid()}"
        write_atomically(trial, b"-" * 4096)
        trial.unlink()
    except OSError as error:
        said = f"{name} {folder}".strip()
        raise RunError(f"{said} cannot be written to: {why(error, folder)}") from error


def check_encodable(path: Path, name: str = "") -> None:
    """Raise `RunError` if Python and the libraries below it would not mean the same file.

    Python names files in the locale's encoding; TensorStore, which writes checkpoints, in
    UTF-8.
    """
    text = os.fspath(path)
    try:
        same = os.fsencode(text) == text.encode()
    except UnicodeEncodeError:
        same = False
    if not same:
        said = f"{name} {text!a}".strip()
        raise RunError(
            f"{said} has characters that this process, whose locale's encoding is "
            f"{sys.getfilesystemencoding()}, can't name files with. Set LC_ALL=C.UTF-8 or "
            "PYTHONUTF8=1, or choose a name in plain ASCII."
        )


def why(error: OSError, folder: Path) -> str:
    """The reason that the system gives for not writing to `folder`, and what helps."""
    reason, remedy = error.strerror or str(error), _REMEDIES.get(error.errno or 0)
    if error.errno == errno.ENOSPC and _no_inodes(folder):
        reason = "No inodes left on device, whatever the space"
        remedy = "Remove files there, or choose another place"
    return f"{reason}. {remedy}." if remedy else f"{reason}."


def system_error(error: BaseException) -> OSError | None:
    """The system's error that `error` tells of, if there is one.

    Libraries wrap it, or have only its text.
    """
    text = []
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen
        text.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    words = " ".join(text)
    codes = map(int, re.findall(r"(?:os_error_code='|OS error )(\d+)", words))  # TensorStore
    named = (number for number in _REMEDIES if os.strerror(number) in words)
    number = next(itertools.chain(codes, named), None)
    return None if number is None else OSError(number, os.strerror(number))


def _no_inodes(folder: Path) -> bool:
    """Whether the file system has a limit on its files, and has reached it."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_files > 0 and found.f_favail == 0
