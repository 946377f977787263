import numpy as np
import pytest

from jaxunet.data.sampler import PADDING, BatchSampler, generator


def test_every_example_is_seen_exactly_once_an_epoch_and_padding_fills_the_last_batch():
    order = BatchSampler(count=10, batch_size=4, seed=7)
    assert order.batches_per_epoch == 3
    epochs = []
    for epoch in range(3):
        batches = [order.indices(epoch * 3 + i) for i in range(3)]
        assert [len(b) for b in batches] == [4, 4, 4]
        flat = np.concatenate(batches)
        assert sorted(flat[:10]) == list(range(10))
        assert (flat[10:] == PADDING).all()
        epochs.append(flat[:10].tolist())
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_determines_the_order_and_none_keeps_the_datasets():
    assert (
        BatchSampler(50, 5, 1).indices(3).tolist() == BatchSampler(50, 5, 1).indices(3).tolist()
    )
    assert (
        BatchSampler(50, 5, 1).indices(3).tolist() != BatchSampler(50, 5, 2).indices(3).tolist()
    )
    assert BatchSampler(7, 3).indices(2).tolist() == [6, PADDING, PADDING]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_parts_make_up_the_same_global_batch(processes):
    whole = BatchSampler(30, 8, seed=3)
    for batch in range(8):
        parts = [
            BatchSampler(30, 8, 3, process, processes).local_indices(batch)
            for process in range(processes)
        ]
        assert np.concatenate(parts).tolist() == whole.indices(batch).tolist()


def test_large_seeds_repeat_themselves_and_are_nobody_elses():
    numbers = generator(2**32 + 5, 3).integers(2**62, size=4)
    assert generator(2**32 + 5, 3).integers(2**62, size=4).tolist() == numbers.tolist()
    # The first of them is two words long, and would be seed 0 at the places 1 and 3.
    others = [(2**33 + 5, 3), (2**32 + 5, 4), (2**32, 3), (0, 1, 3)]
    drawn = [generator(*place).integers(2**62, size=4).tolist() for place in others]
    assert len({tuple(each) for each in (*drawn, numbers.tolist())}) == 5
    # One word's are NumPy's own, as ever.
    expected = np.random.default_rng((2**32 - 1, 3)).integers(2**62, size=4)
    assert generator(2**32 - 1, 3).integers(2**62, size=4).tolist() == expected.tolist()
