"""Weights that load and were trained for another network are told from those that are right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from jaxunet.config import ModelConfig
from jaxunet.errors import DataError
from jaxunet.model.encoders.registry import LITES
from jaxunet.model_config import EncoderName
from jaxunet.pretrained.files import read_bytes, read_tensors
from jaxunet.pretrained.origin import check_origin, spread_of_pictures
from jaxunet.pretrained.renaming import names_of
from jaxunet.pretrained.sources import SOURCES
from jaxunet.pretrained.starting import starting_weights

DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)  # of ImageNet's, which timm divides by


def timms() -> dict[str, np.ndarray]:
    """TensorFlow's weights in timm's names."""
    path, _ = SOURCES["efficientnet_lite0"].find()
    tensors = read_tensors(path, read_bytes(path))
    theirs, ours = (names_of("efficientnet_lite0", layout) for layout in ("timm", "package"))
    return {name: tensors[ours[place]] for place, name in theirs.items()}


def test_the_right_weights_are_taken_and_their_twin_is_refused(tmp_path: Path) -> None:
    tensors = timms()
    # The same network for pictures that are normalised by ImageNet's mean and deviation: its
    # first layer gives the same but for a constant, and so with the same variance.
    changed = tensors["conv_stem.weight"] * (DEVIATION / 0.5)[:, None, None]
    right, wrong = tmp_path / "right.safetensors", tmp_path / "wrong.safetensors"
    right.write_bytes(safetensors.numpy.save(tensors))
    wrong.write_bytes(safetensors.numpy.save({**tensors, "conv_stem.weight": changed}))
    assert starting_weights(ModelConfig(encoder="efficientnet_lite0", weights=right))
    with pytest.raises(DataError) as refusal:
        starting_weights(ModelConfig(encoder="efficientnet_lite0", weights=wrong))
    said = str(refusal.value)
    assert said.startswith(f"{wrong} fits efficientnet_lite0, but was trained for timm's own")
    assert "pictures of standard deviation 1.15" in said
    assert "Give timm's tf_efficientnet_lite0, or model.weights 'imagenet'." in said


def stem(kernel: np.ndarray, variance: np.ndarray) -> dict[str, Any]:
    return {
        "params": {"stem": {"kernel": kernel}},
        "batch_stats": {"stem_norm": {"var": variance}},
    }


@pytest.mark.parametrize("encoder", LITES)
def test_the_pictures_that_a_network_saw_show_in_its_weights(encoder: EncoderName) -> None:
    path, _ = SOURCES[encoder].find()
    tensors = read_tensors(path, read_bytes(path))
    kernel = tensors["_conv_stem.weight"].transpose(2, 3, 1, 0)
    variables = stem(kernel, tensors["_bn0.running_var"])
    assert spread_of_pictures(variables) == pytest.approx(0.525, abs=0.01)
    check_origin(encoder, variables, path, SOURCES[encoder].sha256)


def test_the_spread_is_that_of_pictures_put_through_the_kernels() -> None:
    rng = np.random.default_rng(5)
    small = rng.normal(0, 1, (9, 9))
    grey = np.kron(small, np.ones((40, 40)))  # neighbours hardly ever differ
    pictures = np.repeat(grey[..., None], 3, axis=2) + rng.normal(0, 0.05, (360, 360, 3))
    kernel = rng.normal(0.05, 0.1, (3, 3, 3, 20))
    windows = np.lib.stride_tricks.sliding_window_view(pictures, (3, 3), (0, 1))
    results = np.einsum("hwcij,ijco->hwo", windows, kernel)
    variance = results.reshape(-1, 20).var(axis=0)
    assert spread_of_pictures(stem(kernel, variance)) == pytest.approx(pictures.std(), rel=0.1)
    kernel[..., :15] = 0  # nothing is alive there
    assert spread_of_pictures(stem(kernel, variance)) == pytest.approx(pictures.std(), rel=0.2)
    variance[:18] = 0
    assert spread_of_pictures(stem(kernel, variance)) is None


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0_ra-37913777.pth",
        "efficientnet_lite0.ra_in1k.safetensors",
        "models--timm--efficientnet_lite0.ra_in1k/snapshots/0a1b/model.safetensors",
    ],
)
def test_timms_own_files_are_known_by_their_names(name: str) -> None:
    blank = stem(np.zeros((3, 3, 3, 4)), np.zeros(4))
    with pytest.raises(DataError, match="its name or its SHA-256 says so"):
        check_origin("efficientnet_lite0", blank, Path("files") / name, "ab" * 32)
    check_origin("resnet18", blank, Path("files") / name, "ab" * 32)
    good = Path("files") / name.replace("efficientnet", "tf_efficientnet")
    check_origin("efficientnet_lite0", blank, good, "ab" * 32)
    with pytest.raises(DataError, match="its name or its SHA-256 says so"):
        check_origin("efficientnet_lite0", blank, Path("a.pth"), "37913777" + "0" * 56)
