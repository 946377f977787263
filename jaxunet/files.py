"""Writing files so that a kill at any moment costs nothing that was there before."""

import json
import os
from pathlib import Path
from threading import get_native_id
from typing import Any
from zlib import crc32


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
