"""What a weight file may hold, and what of it is taken: no model is made here."""

import io
import json
import math
import os
import pickle
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from pytorch_designs import MilesialUNet, ReferenceUNet, arrays, enliven

from jaxunet.errors import ConfigError, DataError
from jaxunet.finite import not_finite
from jaxunet.interop.layouts import prefixes, recognize, shown
from jaxunet.interop.pytorch import counters, variables_from_state_dict
from jaxunet.interop.weight_files import check_target, load_weights, save_weights, unwritable

PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net.unet.module."]


def reference() -> dict[str, torch.Tensor]:
    return enliven(ReferenceUNet(2, depth=3)).state_dict()


def milesial() -> dict[str, torch.Tensor]:
    return enliven(MilesialUNet(2, depth=3)).state_dict()


def saved(path: Path, value: object) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(value, path)
    else:
        torch.save(value, path)
    return path


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor.numpy()), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("design", [reference, milesial])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_network_is_found_under_any_prefix(prefix, design, suffix, tmp_path):
    state = prefixed(design(), prefix)
    others = {"n_averaged": torch.tensor(3), "loss.pos_weight": torch.ones(1)}
    found = load_weights(saved(tmp_path / f"w{suffix}", state | others))
    assert (found.prefix, found.dictionary) == (prefix, "")
    assert sorted(found.left_out) == sorted(others)
    assert_same(found.state, design())


@pytest.mark.parametrize("keys", [["ema"], ["my weights"], ["checkpoint", "net"], ["a"] * 4])
def test_a_network_is_found_in_a_dictionary_of_any_name(keys, tmp_path):
    inner = prefixed(milesial(), "module.")
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    circle: dict = {"epoch": 3}
    circle["itself"] = circle
    found: object = inner
    for key in reversed(keys):
        found = {key: found, "optimizer": optimizer, "circle": circle}
    weights = load_weights(saved(tmp_path / "w.pth", found))
    assert (weights.dictionary, weights.prefix) == (".".join(keys), "module.")
    assert_same(weights.state, milesial())


def test_of_several_networks_the_usual_key_is_taken_or_all_are_named(tmp_path):
    mine, other = reference(), {n: t + 1 for n, t in reference().items()}
    path = tmp_path / "w.pth"
    for key in ("state_dict", "model_state_dict"):
        weights = load_weights(saved(path, {"ema": other, key: mine}))
        assert weights.dictionary == key
        assert_same(weights.state, mine)
    for value, named in (
        ({"student": mine, "teacher": other}, "teacher, student"),
        (prefixed(mine, "model.") | prefixed(other, "ema.module."), "model., ema.module."),
        ({**mine, "ema": other}, "no name at all, ema"),
    ):
        with pytest.raises(DataError, match=f"2 networks, under {named}. Save the one"):
            load_weights(saved(path, value))


def test_prefixes_are_those_of_two_levels_or_more():
    assert prefixes(["a.downConv1.0.weight", "a.out.weight", "downConv1.0.weight"]) == []
    assert prefixes(["a.downConv2.0.weight", "b.up1.conv.x", "mydown7.conv.x"]) == ["a.", "b."]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn"])
def test_weights_of_every_floating_type_become_float32(dtype, suffix, tmp_path):
    state = {name: t.to(getattr(torch, dtype)) for name, t in reference().items()}
    found = load_weights(saved(tmp_path / f"w{suffix}", state)).state
    assert {t.dtype for t in found.values()} == {np.dtype(np.float32)}
    assert_same(found, {name: tensor.float() for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("upConv1.0.bias", lambda t: t.index_fill(0, torch.tensor([1]), math.nan), "1 values"),
        ("downConv2.0.weight", lambda t: t / 0, "72 values that are not finite, of 72"),
        ("out.weight", lambda t: t.double() + 1e300, "2 values that are not finite, of 2"),
        ("out.weight", lambda t: t.to(torch.complex64), "is complex64, expected floating"),
        ("out.bias", lambda t: t > 0, "is bool, expected floating"),
        ("inc.double_conv.1.running_var", lambda t: -t, "2 variances below zero"),
        ("inc.double_conv.1.num_batches_tracked", lambda t: t - 99, "is -82, expected a count"),
        ("inc.double_conv.1.num_batches_tracked", lambda t: t + 2**60, "expected a count"),
        ("inc.double_conv.1.num_batches_tracked", lambda t: t > 0, "is bool, expected integer"),
        ("inc.double_conv.1.num_batches_tracked", lambda t: t * 1j, "is complex64, expected"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_values_that_are_none_are_refused_by_name(name, change, message, tmp_path):
    state = milesial() if name.startswith("inc") else reference()
    state[name] = change(state[name])
    found = load_weights(saved(tmp_path / "w.pth", state)).state
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        variables_from_state_dict(found)


def test_the_first_array_that_is_not_finite_is_named():
    tree = {"params": {"a": np.ones(3), "b": {"c": np.array([1, np.inf, -np.inf, np.nan])}}}
    assert not_finite(tree) == "params.b.c holds 3 values that are not finite, of 4"
    assert not_finite({"whole": np.arange(3), "empty": np.zeros((0, 2))}) == ""


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


def test_counters_survive_as_they_are():
    state = {"a.num_batches_tracked": np.array(2**53 - 1), "a.weight": np.ones(1)}
    assert counters(state) == {"a.num_batches_tracked": 2**53 - 1}


@pytest.mark.parametrize("check", [check_target, lambda path: save_weights(path, {})])
def test_a_target_that_cannot_be_written_is_refused(check, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pth").mkdir()
    for path, message in (
        ("file/w.pth", "file is no directory"),
        ("folder.pth", "it is a directory"),
    ):
        with pytest.raises(DataError, match=f"cannot be written: .*{message}"):
            check(tmp_path / path)
    with pytest.raises(ConfigError, match=r"ends with '\.onnx'"):
        check(tmp_path / "w.onnx")
    # This may run as root, whom no permission stops.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert unwritable(tmp_path / "new" / "newer") == f"{tmp_path} may not be written to"
    with pytest.raises(DataError, match="may not be written to"):
        check(tmp_path / "new" / "w.safetensors")
