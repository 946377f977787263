"""Files of the algorithms that XLA chose on a GPU: read if they are whole, and added to.

In the text form of XLA's `AutotuneResults`: a version, and an entry for each operation. XLA
refuses to compile anything with a file that it can't read, and writes its own anew after each
compilation, two at a time if two are compiled at once.
"""

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from jaxunet.files import write_atomically

_VALUE = r'\w+: (?:"(?:[^"\\]|\\.)*"|[^"]*)'
_LINE = re.compile(rf"(?P<indent> *)(?:[\w./\[\]]+ )?(?P<word>\{{|\}}|{_VALUE})")


def read(path: Path) -> str | None:
    """What the file holds; None where there is none, or it is not whole."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return None if _entries(text) is None else text


def add(path: Path, found: str) -> None:
    """Add the entries of `found` for operations that `path` has none of, or begin it.

    Several processes may do so at the same time. What can't be written is left out: the next
    start searches again.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks: then the last one stays
                fcntl.flock(folder, fcntl.LOCK_EX)
            before = read(path)
            after = found if before is None else _joined(before, found)
            if after != before:
                write_atomically(path, after)
        finally:
            os.close(folder)


def _joined(first: str, second: str) -> str:
    """The entries of both; of an operation in both, the first's."""
    known = _entries(first) or {}
    more = {of: entry for of, entry in (_entries(second) or {}).items() if of not in known}
    return first + "".join(more.values())


def _entries(text: str) -> dict[tuple[str, ...], str] | None:
    """The text of each entry, by its plain fields (the device, the operation); None if the
    text is cut or mixed up."""
    version, *entries = re.split(r"^(?=results \{$)", text, flags=re.MULTILINE)
    if not re.fullmatch(r"version: \d+\n", version):
        return None
    found = {}
    for entry in entries:
        depth, fields = 0, []
        *lines, end = entry.split("\n")
        for line in lines:
            match = _LINE.fullmatch(line)
            if match is None:
                return None
            depth -= match["word"] == "}"
            if len(match["indent"]) != 2 * depth:
                return None
            if depth == 1 and match["word"] not in ("{", "}"):
                fields.append(line)
            depth += match["word"] == "{"
        if end or lines[-1] != "}" or lines.count("}") != 1:
            return None
        found[tuple(fields)] = entry
    return found
