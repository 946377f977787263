"""Paired comparisons: by hand, and by the script on two runs."""

import numpy as np
import pytest
from scipy import stats

from jaxunet.inference.comparison import compare, most_different
from jaxunet.learning.metrics import per_image

FIRST = np.array([[8, 1, 1, 6], [5, 5, 5, 1], [9, 0, 0, 7], [2, 0, 8, 6], [7, 2, 3, 4]])
SECOND = np.array([[7, 1, 2, 6], [5, 0, 5, 6], [9, 0, 0, 7], [6, 0, 4, 6], [4, 2, 6, 4]])


def test_differences_are_paired_and_signed_first_less_second():
    found = compare(FIRST, SECOND)
    one, other = (
        np.array([2 * t / (2 * t + f + m) for t, f, m, _ in c]) for c in (FIRST, SECOND)
    )
    assert found["dice"]["first"] == pytest.approx(one.mean())
    assert found["dice"]["second"] == pytest.approx(other.mean())
    assert found["dice"]["difference"] == pytest.approx((one - other).mean())
    low, high = found["dice"]["interval"]
    assert low < (one - other).mean() < high
    assert found["dice"]["p"] == pytest.approx(stats.wilcoxon(one, other).pvalue)
    assert compare(SECOND, FIRST)["dice"]["difference"] == pytest.approx((other - one).mean())


def test_a_model_does_not_differ_from_itself():
    for each in compare(FIRST, FIRST).values():
        assert (each["difference"], each["interval"], each["p"]) == (0, [0, 0], 1)


def test_the_images_that_differ_most_come_first():
    dice = per_image(FIRST)["dice"] - per_image(SECOND)["dice"]
    assert most_different(FIRST, SECOND, 2) == [3, 4] == list(np.argsort(-np.abs(dice))[:2])
