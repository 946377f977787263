"""Reading on from another place, and numbers of 16 bits."""

import io

import numpy as np
from PIL import Image

from jaxunet.config import DataConfig
from jaxunet.data.images import read_image
from jaxunet.data.masks import read_mask
from jaxunet.data.pipeline import make_batches
from jaxunet.data.sampler import BatchSampler


class Numbered:
    """Examples that hold their own number."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {
            "image": np.full((4, 4, 3), index, np.uint8),
            "mask": np.zeros((4, 4, 1), np.uint8),
        }


def test_a_position_set_on_a_reader_that_has_begun_counts():
    batches = make_batches(
        Numbered(), DataConfig(image_size=4), BatchSampler(12, 3), last_batch=4
    )

    def read():
        return next(batches)["image"][:, 0, 0, 0].tolist()

    assert [read(), read()] == [[0, 1, 2], [3, 4, 5]]
    batches.set_state({"next_batch": 1})
    assert batches.get_state() == {"next_batch": 1}
    assert read() == [3, 4, 5]
    batches.set_state({"next_batch": 3})
    assert read() == [9, 10, 11]
    assert batches.get_state() == {"next_batch": 4}
    assert list(batches) == []


def test_one_process_reads_whole_batches_unless_told_otherwise():
    order = BatchSampler(7, 4, seed=2)
    for batch in range(4):
        assert order.local_indices(batch).tolist() == order.indices(batch).tolist()


def test_padding_is_the_number_of_no_example():
    assert BatchSampler(7, 3).indices(2).tolist() == [6, -1, -1]


def test_the_order_is_that_of_numpys_generator_in_every_process_and_version():
    # Drawn by another generator, or by one without a seed, a run could not be gone on with.
    order = BatchSampler(50, 5, seed=9)
    for epoch in range(2):
        expected = np.random.default_rng((9, epoch)).permutation(50)
        found = np.concatenate([order.indices(10 * epoch + n) for n in range(10)])
        np.testing.assert_array_equal(found, expected)


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(np.array([values], np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_sixteen_bits_are_rounded_to_the_nearest_of_eight():
    # 65535 / 255 = 257 values of 16 bits for one of 8.
    values = [128, 129, 257 * 100 - 129, 257 * 100 - 128, 257 * 100 + 128, 257 * 100 + 129]
    expected = [0, 1, 99, 100, 100, 101]
    assert read_image(png(values))[0, :, 0].tolist() == expected
    # So does a mask: lesion is above 127 of 255.
    edge = 257 * 127 + 128
    found = read_mask(png([0, edge, edge + 1, 65535]), binarize=True)
    assert found[0, :, 0].tolist() == [0, 0, 255, 255]
