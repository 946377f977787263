"""Weight files that hurt: what they declare is refused in little time and memory."""

import io
import json
import os
import pickle
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from pytorch_designs import MilesialUNet, ReferenceUNet, arrays
from test_weight_files import assert_same, prefixed, reference, saved

from jaxunet.errors import DataError, shown
from jaxunet.interop.layouts import recognize
from jaxunet.interop.pytorch import variables_from_state_dict
from jaxunet.interop.weight_files import load_weights


def safetensors_file(path: Path, *entries: tuple[str, str, list[int], int], size: int) -> Path:
    """A file with a header of (name, type, shape, length) and `size` bytes."""
    header, at = "", 0
    for name, dtype, shape, length in entries:
        offsets = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
        header += f", {json.dumps(name)}: {json.dumps(offsets)}"
        at += length
    text = ("{" + header[2:] + "}").encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def refused(path: Path, message: str, *, megabytes: float = 40, seconds: float = 5) -> None:
    """`path` is, in little time and memory (tracemalloc sees Python's and NumPy's)."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(DataError, match=message):
            variables_from_state_dict(load_weights(path).state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1e6
    assert time.process_time() - start < seconds


@pytest.mark.parametrize("level", [12, 300_000, 999_999_999])
@pytest.mark.parametrize("name", ["downConv{}.0.weight", "up{}.conv.double_conv.0.weight"])
def test_a_level_that_the_file_cannot_hold_is_refused_at_once(name, level, tmp_path):
    entry = (name.format(level), "F32", [2, 2, 3, 3], 144)
    refused(safetensors_file(tmp_path / "w.safetensors", entry, size=144), "for level")


def test_levels_and_shapes_that_no_number_holds_are_refused_at_once(tmp_path):
    path = tmp_path / "w.safetensors"
    digits = "downConv" + "9" * 5000 + ".0.weight"
    refused(safetensors_file(path, (digits, "F32", [1], 4), size=4), "not the weights of")
    empty = ("downConv2.0.weight", "F32", [2**40, 0], 0)
    refused(safetensors_file(path, empty, size=0), "for level 2")
    wide = [
        ("downConv2.0.weight", "F32", [2**40, 0], 0),
        ("downConv1.0.bias", "F32", [64], 256),
    ]
    refused(safetensors_file(path, *wide, size=256), r"is \[1099511627776, 0\], expected")


def test_the_deepest_real_networks_pass_the_check_of_levels():
    for depth in range(2, 8):
        state = arrays(ReferenceUNet(1, depth=depth))
        assert recognize({n: t.shape for n, t in state.items()})[1].depth == depth


@pytest.mark.parametrize(
    ("shape", "length", "size"),
    [([2**62, 4], 4, 4), ([-1], 4, 4), ([4], 16, 4), ([2], 4, 4), ([1], 4, 8)],
)
def test_sizes_that_safetensors_declares_falsely_are_refused(shape, length, size, tmp_path):
    entry = ("downConv2.0.weight", "F32", shape, length)
    refused(safetensors_file(tmp_path / "w.safetensors", entry, size=size), "not a readable")


def test_overlapping_doubled_and_unknown_tensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    twice = [("downConv2.0.weight", "F32", [1], 4)] * 2
    refused(safetensors_file(path, *twice, size=8), "not a readable")
    text = path.read_bytes().replace(b"[4, 8]", b"[0, 4]").replace(b"weight", b"wright", 1)
    path.write_bytes(text[:-4])
    refused(path, "not a readable")
    refused(safetensors_file(path, ("x", "F4", [2], 1), size=1), "x is of type F4; known: F64")


def rezipped(contents: bytes, compression: int) -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(contents)) as old,
        zipfile.ZipFile(out, "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def test_an_archive_that_unpacks_to_more_than_its_length_is_refused(tmp_path):
    state = {**reference(), "upConv1.0.weight": torch.zeros(8, 16, 128, 128)}
    path = saved(tmp_path / "w.pth", state)
    contents = path.read_bytes()
    path.write_bytes(rezipped(contents, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < len(contents) / 50
    refused(path, rf"its {path.stat().st_size} bytes would unpack to 83\d{{5}},", megabytes=1)
    saved(path, reference())
    path.write_bytes(rezipped(path.read_bytes(), zipfile.ZIP_STORED))
    assert_same(load_weights(path).state, reference())


def stretched(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {**reference(), "upConv1.0.weight": torch.ones(1, dtype=dtype).expand(2**20, 2**20)}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_a_tensor_stretched_out_of_one_value_is_refused(dtype, legacy, tmp_path):
    torch.save(stretched(dtype), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    size = torch.ones(1, dtype=dtype).element_size() * 2**40
    refused(tmp_path / "w.pth", rf"would take {str(size)[:8]}\d+: they repeat values")


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Calls(bytearray, 2**40), r"would run code \(\w+\.bytearray\)"),
        (Calls(torch.FloatTensor, 2**34), r"more than plain tensors \(torch\.FloatTensor\)"),
        (torch.ones(2).to_sparse(), r"more than plain.*_rebuild_sparse_tensor"),
        (torch.ones(2, device="meta"), r"more than plain.*_rebuild_meta_tensor_no_storage"),
    ],
    ids=["bytearray", "empty", "sparse", "meta"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_makes_memory_out_of_a_number_is_refused(value, message, legacy, tmp_path):
    torch.save({"w": value}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "w.pth", message)


def test_a_storage_declared_in_an_old_file_without_its_values_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(reference(), path, _use_new_zipfile_serialization=False)
    assert_same(load_weights(path).state, reference())
    # The number of elements of the first storage (216: 2 * 3 * 3 * 3 * 4 bytes, 54 values).
    old, new = b"X\x03\x00\x00\x00cpuq", b"J"
    contents = path.read_bytes()
    place = contents.index(old) + len(old) + 1
    assert contents[place : place + 2] == b"K\x36"
    changed = contents[:place] + new + (2**30).to_bytes(4, "little") + contents[place + 2 :]
    path.write_bytes(changed)
    refused(path, "none, or damaged")


def test_ordinary_checkpoints_are_not_taken_for_hostile_ones(tmp_path):
    model = MilesialUNet(2, depth=3)
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": p} for i, p in enumerate(model.parameters())
    }
    checkpoint = {
        "net": prefixed(model.state_dict(), "module."),
        "optimizer": {"state": moments, "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-3}]},
        "scheduler": {"milestones": Counter({3: 1}), "last_lr": [1e-4]},
        "parameters": list(model.parameters()),
        "rng": torch.get_rng_state(),
        "about": {
            "size": torch.Size([2]),
            "device": torch.device("cpu"),
            "set": {1},
            "b": b"x",
        },
        "dtype": torch.bfloat16,
    }
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pth"
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
        assert_same(load_weights(path).state, model.state_dict())


def test_what_is_no_state_dict_is_named_for_what_it_is(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save's
        archive.writestr("w/constants.pkl", b")\x85.")
    refused(path, "TorchScript")
    refused(saved(path, {**reference(), 3: torch.ones(1)}), "no tensors: <int>")
    refused(saved(path, {**reference(), "bad\x1b[2J": 1}), r"no tensors: 'bad\\x1b\[2J'\.\.\.")
    assert len(shown("a" * 10**6)) < 120
    path.write_bytes(pickle.dumps({"downConv2.0.weight": [1]}))
    refused(path, "none, or damaged")
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "a device or a pipe")
    refused(tmp_path, "Is a directory")
