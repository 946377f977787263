import json
import os

import pytest

from jaxunet.files import write_atomically, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"before")

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "after")
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_json_is_written_as_any_reader_reads_it(tmp_path):
    value = {"dice": 0.1 + 0.2, "names": ["\u00e4"], "none": None}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
