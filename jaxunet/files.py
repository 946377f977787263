"""Writing files so that a kill at any moment costs nothing that was there before."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, contents: bytes | str) -> None:
    """Make `path` hold all of `contents`, or what it held before; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def unwritable(folder: Path) -> str:
    """What keeps `folder` from being made or written to, told without doing so; else ''."""
    try:
        there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
        if not there.is_dir():
            return f"{there} is no directory"
        return "" if os.access(there, os.W_OK) else f"{there} may not be written to"
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return str(error.strerror)
