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
