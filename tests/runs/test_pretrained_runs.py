"""Runs whose encoder starts from a weight file."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from tiny_encoder import TINY, tiny_encoder

from jaxunet.config import Config, DataConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.errors import DataError
from jaxunet.pretrained.renaming import names_of, shapes_of
from jaxunet.pretrained.sources import digest
from jaxunet.runs.loading import load
from jaxunet.runs.training import train


@pytest.fixture
def weights(tmp_path: Path):
    """A file of a tiny encoder's weights, in timm's names."""
    with tiny_encoder():
        rng, tensors = np.random.default_rng(0), {}
        for path, name in names_of(TINY.encoder, "timm").items():
            value = rng.uniform(0.2, 0.6, shapes_of(TINY.encoder)[path]).astype(np.float32)
            if value.ndim == 2:
                value = value[None, None]
            tensors[name] = np.ascontiguousarray(value.transpose(*range(value.ndim)[::-1]))
            if value.ndim == 4:
                tensors[name] = np.ascontiguousarray(value.transpose(3, 2, 0, 1))
        path = tmp_path / "weights.safetensors"
        path.write_bytes(safetensors.numpy.save(tensors))
        yield path


def test_a_run_starts_from_its_file_and_resumes_bit_for_bit(weights: Path, tmp_path: Path):
    config = Config(
        data=DataConfig(
            image_size=16,
            prepared_dir=tmp_path / "prepared",
            synthetic_train=8,
            synthetic_validation=8,
        ),
        model=replace(TINY, weights=weights),
        optimizer=OptimizerConfig(learning_rate=0.01, encoder_rate=0.5, freeze_epochs=1),
        train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8),
    )
    data = prepare(config.data, progress=False)
    whole = train(config, data, tmp_path / "whole", show_progress=False).state

    first = replace(config, train=replace(config.train, epochs=1))
    train(first, data, tmp_path / "parts", show_progress=False)
    after_one = traverse_util.flatten_dict(
        load(tmp_path / "parts").variables["params"]["encoder"]
    )
    names, tensors = names_of(TINY.encoder, "timm"), safetensors.numpy.load_file(weights)
    for path, value in after_one.items():  # frozen
        theirs = tensors[names["params", *path]]
        ours = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs
        np.testing.assert_array_equal(value, ours.reshape(value.shape))

    weights.unlink()  # it is no longer needed
    parts = train(config, data, tmp_path / "parts", resume=True, show_progress=False).state
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    moved = parts.params["encoder"]["stem"]["kernel"] != after_one["stem", "kernel"]
    assert moved.any()

    record = json.loads((tmp_path / "parts" / "config.json").read_text())["weights"]
    assert record["source"] == "weights.safetensors"
    assert record == json.loads((tmp_path / "whole" / "config.json").read_text())["weights"]
    assert len(record["sha256"]) == len(digest(b""))
    with pytest.raises(DataError, match=r"weights\.safetensors, which model\.weights names"):
        train(config, data, tmp_path / "other", show_progress=False)
