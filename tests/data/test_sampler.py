import numpy as np
import pytest

from jaxunet.data.sampler import PADDING, BatchSampler


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
