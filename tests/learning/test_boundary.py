"""Boundary scores, by hand and against a count over all pairs of boundary pixels."""

import numpy as np
import pytest
from scipy import ndimage

from jaxunet.learning.boundary import boundary, boundary_scores


def shape(*rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def square(top: int, left: int, side: int, height: int = 40, width: int = 30) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def blob(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((33, 47))
    return ndimage.gaussian_filter(noise, 3) > 0.05


def counted(prediction: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[float, float]:
    """The same scores from a loop over pixels and a table of all distances."""

    def edge(mask: np.ndarray) -> np.ndarray:
        height, width = mask.shape
        return np.array(
            [
                (row, column)
                for row, column in np.argwhere(mask)
                for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if not (0 <= row + down < height and 0 <= column + right < width)
                or not mask[row + down, column + right]
            ]
        )

    first, second = (np.unique(edge(mask), axis=0) for mask in (prediction, truth))
    apart = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    nearest = [apart.min(axis=1), apart.min(axis=0)]
    within = np.concatenate(nearest) <= tolerance
    return max(np.percentile(each, 95) for each in nearest), within.mean()


def test_a_boundary_is_what_touches_the_outside_by_a_side() -> None:
    mask = shape("......", ".####.", ".####.", ".####.", "......")
    found = {tuple(point) for point in boundary(mask)}
    assert found == {tuple(point) for point in np.argwhere(mask)} - {(2, 2), (2, 3)}
    # What a corner alone connects to the outside is inside.
    mask = shape("####", "####", "##.#", "####")
    assert {tuple(p) for p in np.argwhere(mask)} - {tuple(p) for p in boundary(mask)} == {
        (1, 1)
    }
    # Beyond the picture is outside.
    assert len(boundary(np.ones((5, 4), bool))) == 2 * 5 + 2 * 2


def test_a_shifted_square_is_as_far_as_it_was_shifted() -> None:
    truth = square(10, 10, 8)
    # Each of 28 pixels; moved by 3, the two sides along the way are 3 off at one end only.
    hd95, nsd = boundary_scores(square(10, 13, 8), truth, 2)
    assert hd95 == 3
    assert nsd == pytest.approx(1 - (8 + 2) / 28)
    assert boundary_scores(square(10, 13, 8), truth, 3).tolist() == [3, 1]
    assert boundary_scores(truth, truth, 0).tolist() == [0, 1]


def test_a_twentieth_of_the_boundary_may_be_anywhere() -> None:
    truth = square(10, 5, 12)  # 44 pixels of boundary
    near, far = truth.copy(), truth.copy()
    near[39, 29] = True
    assert boundary_scores(near, truth, 0) == pytest.approx([0, 88 / 89])
    # The 95th percentile of 47 lies at 0.7 between the 44th and the 45th in order.
    far[37:40, 29] = True
    assert boundary_scores(far, truth, 0)[0] == pytest.approx(0.7 * np.hypot(37 - 21, 29 - 16))


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_all_pairs_of_boundary_pixels(seed: int) -> None:
    prediction, truth = blob(seed), blob(seed + 50)
    assert prediction.any()
    assert truth.any()
    found = boundary_scores(prediction, truth, 2.0)
    assert found == pytest.approx(counted(prediction, truth, 2.0), rel=1e-12)
    assert 0 < found[1] < 1
    np.testing.assert_array_equal(boundary_scores(truth, prediction, 2.0), found)


def test_an_empty_mask_is_a_diagonal_away_and_two_are_alike() -> None:
    mask, empty = square(3, 3, 5, 30, 40), np.zeros((30, 40), bool)
    assert boundary_scores(mask, empty, 99).tolist() == [50, 0]
    assert boundary_scores(empty, mask, 99).tolist() == [50, 0]
    assert boundary_scores(empty, empty, 0).tolist() == [0, 1]
