"""What a record says that something was made from, compared with what is there.

A run, a prepared dataset, a checkpoint, a weight file and each host carry such a record:
fingerprint, counts, configuration, versions, checksum. Whoever opens one asks `disagreement`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any


def disagreement(
    record: Mapping[str, Any],
    found: Mapping[str, Any],
    *,
    recorded: str,
    there: str,
    ignore: Collection[str] = (),
) -> str | None:
    """None where the record fits what was found, else a sentence that names both.

    At the first level only what both sides state is compared, as records of older versions say
    less, and None states nothing; below it all is, and what one lacks is None. A fingerprint of
    another length is of another scheme and says nothing either: then the counts decide.

    Args:
        record, found: nested mappings of plain values.
        recorded, there: the two sides in words that a user knows them by.
        ignore: full names of fields, such as `data.dir`, that may differ.
    """
    changed = [line for name, line in _changes(record, found, "") if name not in ignore]
    if not changed:
        return None
    return f"{recorded} does not fit {there}. Differing: {'; '.join(changed)}."


def _changes(
    record: Mapping[str, Any], found: Mapping[str, Any], where: str
) -> Iterator[tuple[str, str]]:
    """Full name of each field that differs, and `name: before -> after`."""
    names = [name for name in (*record, *found) if where or (name in record and name in found)]
    for name in dict.fromkeys(names):
        before, after = record.get(name), found.get(name)
        full = f"{where}{name}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{full}.")
        elif before != after and (where or not _silent(name, before, after)):
            yield full, f"{full}: {before!r} -> {after!r}"


def _silent(name: str, before: Any, after: Any) -> bool:
    if before is None or after is None:
        return True
    return name == "fingerprint" and len(str(before)) != len(str(after))
