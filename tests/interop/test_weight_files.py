"""What a weight file may hold, and what of it is taken: no model is made here."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from pytorch_designs import MilesialUNet, ReferenceUNet, enliven

from jaxunet.errors import ConfigError, DataError
from jaxunet.interop.layouts import prefixes
from jaxunet.interop.pytorch import counters, variables_from_state_dict
from jaxunet.interop.weight_files import check_target, load_weights, save_weights, unwritable
from jaxunet.runs.finite import not_finite

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
