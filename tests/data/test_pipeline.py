import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jaxunet.config import DataConfig
from jaxunet.data.pipeline import make_batches
from jaxunet.data.reader import InMemory
from jaxunet.data.sampler import BatchSampler
from jaxunet.errors import DataError


class Pictures:
    """Seven noisy examples of 12 x 12; `reads` counts how often each is decoded."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (7, 12, 12, 3), np.uint8)
        self.masks = rng.integers(0, 2, (7, 12, 12, 1), np.uint8) * 255
        self.reads = [0] * 7

    def __len__(self):
        return 7

    def __getitem__(self, i):
        self.reads[i] += 1
        return {"id": str(i), "image": self.images[i], "mask": self.masks[i]}


def take_all(source, config, order, total=6, start=0):
    batches = make_batches(source, config, order, total)
    batches.set_state({"next_batch": start})
    return list(batches)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() == {"image", "mask", "weight"}
        for name in a:
            assert a[name].dtype == np.uint8
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_hold_the_examples_of_the_order_and_zero_weight_padding():
    source, order = Pictures(), BatchSampler(7, 3, seed=1)
    found = take_all(source, DataConfig(image_size=12), order)
    for number, batch in enumerate(found):
        indices = order.indices(number)
        assert batch["weight"].tolist() == (indices >= 0).astype(int).tolist()
        for row, index in enumerate(indices):
            if index >= 0:
                np.testing.assert_array_equal(batch["image"][row], source.images[index])
                np.testing.assert_array_equal(batch["mask"][row], source.masks[index])


def test_images_are_resized_by_pillow_and_masks_stay_binary():
    source = Pictures()
    batch = take_all(source, DataConfig(image_size=8), BatchSampler(7, 7), total=1)[0]
    expected = Image.fromarray(source.images[2]).resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(batch["image"][2], np.asarray(expected))
    assert set(np.unique(batch["mask"])) == {0, 255}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_restores_the_rest_of_the_batches(workers):
    config, order = DataConfig(image_size=12, workers=workers), BatchSampler(7, 3, seed=1)
    expected = take_all(Pictures(), DataConfig(image_size=12), order)
    batches = make_batches(Pictures(), config, order, 6)
    first = [next(batches) for _ in range(2)]
    state = batches.get_state()
    again = make_batches(Pictures(), config, order, 6)
    again.set_state(state)
    assert_same(first + list(again), expected)


def assert_nothing_runs():
    """No thread of Grain's and no worker, soon: a thread ends what it has begun."""
    deadline = time.monotonic() + 20
    while [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_closed_when_asked_and_at_a_change_of_position(workers):
    config, order = DataConfig(image_size=12, workers=workers), BatchSampler(7, 3, seed=1)
    expected = take_all(Pictures(), DataConfig(image_size=12), order)
    batches = make_batches(Pictures(), config, order, 6)
    first = next(batches)
    batches.close()
    assert_nothing_runs()
    assert_same([first, next(batches)], expected[:2])  # the position stays
    batches.set_state({"next_batch": 5})
    assert_nothing_runs()


def test_batches_are_closed_at_the_end():
    batches = make_batches(Pictures(), DataConfig(image_size=12), BatchSampler(7, 3), 6)
    assert len(list(batches)) == 6
    assert_nothing_runs()
    assert list(batches) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_closed_when_one_cannot_be_read(workers):
    source = Pictures()
    source.images = source.images[:2]  # any other raises
    config = DataConfig(image_size=12, workers=workers)
    batches = make_batches(source, config, BatchSampler(7, 3), 6)
    with pytest.raises(IndexError, match="out of bounds"):
        list(batches)
    assert_nothing_runs()


def test_the_host_cache_decodes_each_example_once_and_changes_no_batch():
    config, order = DataConfig(image_size=8), BatchSampler(7, 3, seed=1)
    source = Pictures()
    assert_same(
        take_all(InMemory(source, 8), config, order), take_all(Pictures(), config, order)
    )
    assert source.reads == [1] * 7


def test_processes_together_read_the_global_batch():
    config = DataConfig(image_size=12)
    whole = take_all(Pictures(), config, BatchSampler(7, 4, seed=5), total=2)
    parts = [
        take_all(Pictures(), config, BatchSampler(7, 4, 5, p, 2), total=2) for p in range(2)
    ]
    for number, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[number][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_tfdata_yields_the_same_batches():
    pytest.importorskip("tensorflow", reason="needs the extra [tf]")
    order = BatchSampler(7, 3, seed=1)
    expected = take_all(Pictures(), DataConfig(image_size=8), order, start=1)
    config = DataConfig(image_size=8, loader="tfdata")
    assert_same(take_all(Pictures(), config, order, start=1), expected)


def test_what_is_wrong_with_a_picture_is_told_by_tfdata_too():
    pytest.importorskip("tensorflow", reason="needs the extra [tf]")

    class Damaged(Pictures):
        def __getitem__(self, index):
            raise DataError("image 7 is damaged")

    config = DataConfig(image_size=8, loader="tfdata")
    with pytest.raises(DataError, match=r"^image 7 is damaged$"):
        take_all(Damaged(), config, BatchSampler(7, 3, seed=1))


def test_nothing_imports_tensorflow_or_torch_unless_asked():
    code = (
        "import sys, jaxunet.runs.training, jaxunet.inference.prediction, jaxunet.data.prepare;"
        "print({'tensorflow', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
