"""Bootstrap intervals against SciPy's, and against draws made one by one."""

import numpy as np
import pytest
from scipy import stats

from jaxunet.learning.bootstrap import intervals, mean_intervals
from jaxunet.learning.metrics import per_image, scores

RNG = np.random.default_rng(3)
COUNTS = RNG.integers(0, 60, (50, 4))


def test_the_interval_of_a_mean_is_scipys():
    values = {"a": RNG.beta(8, 2, 60), "b": RNG.normal(0, 3, 60)}
    found = mean_intervals(values)
    for name, each in values.items():
        expected = stats.bootstrap(
            (each,), np.mean, method="percentile", n_resamples=20_000, rng=1
        ).confidence_interval
        assert found[name] == pytest.approx(
            tuple(expected), abs=0.06 * each.std() / 60**0.5 * 3
        )


def test_pooled_scores_are_those_of_drawn_images_pooled():
    rng = np.random.default_rng(8)
    drawn = [COUNTS[rng.integers(0, 50, 50)].sum(axis=0, keepdims=True) for _ in range(4000)]
    for name in ("dice", "iou"):
        values = [per_image(each)[name][0] for each in drawn]
        expected = np.quantile(values, [0.025, 0.975])
        assert intervals(COUNTS)["pooled"][name] == pytest.approx(expected, abs=0.004)


def test_every_score_lies_in_its_interval_and_batches_are_drawn_whole():
    found, values = intervals(COUNTS), scores(COUNTS)
    assert {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in values.items()}
    for protocol, each in values.items():
        for name, value in each.items():
            low, high = found[protocol][name]
            assert low < value < high
    # Four images are one batch, of which there is only one draw.
    low, high = intervals(COUNTS[:4])["batch_of_4"]["dice"]
    assert low == pytest.approx(high) == pytest.approx(scores(COUNTS[:4])["batch_of_4"]["dice"])


def test_a_single_image_has_an_interval_of_no_width():
    for values in intervals(COUNTS[:1]).values():
        for low, high in values.values():
            assert low == pytest.approx(high)
