import any_torchvision  # noqa: F401  before torchmetrics, which asks for it
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

from jaxunet.learning.metrics import confusion_counts, per_image, scores

NAMES = ("dice", "iou", "threshold_jaccard", "accuracy", "sensitivity", "specificity")


def score(tp, fp, fn, tn):
    return {k: float(v[0]) for k, v in per_image(np.array([[tp, fp, fn, tn]])).items()}


def test_counts_are_those_of_a_hand_count():
    prediction = jnp.array([[1, 1, 0], [0, 1, 0]], bool).reshape(1, 2, 3, 1)
    truth = jnp.array([[1, 0, 0], [1, 1, 0]], bool).reshape(1, 2, 3, 1)
    assert confusion_counts(prediction, truth).tolist() == [[2, 1, 1, 2]]


@pytest.mark.parametrize(
    ("case", "counts", "expected"),
    [
        ("a third each", (2, 1, 1, 6), (2 / 3, 1 / 2, 0, 8 / 10, 2 / 3, 6 / 7)),
        ("at the threshold", (13, 7, 0, 80), (26 / 33, 0.65, 0.65, 0.93, 1, 80 / 87)),
        ("below it", (1299, 701, 0, 8000), (2598 / 3299, 0.6495, 0, 0.9299, 1, 8000 / 8701)),
        ("both empty", (0, 0, 0, 9), (1, 1, 1, 1, 1, 1)),
        ("empty truth", (0, 4, 0, 5), (0, 0, 0, 5 / 9, 1, 5 / 9)),
        ("one pixel too many", (0, 1, 0, 8), (0, 0, 0, 8 / 9, 1, 8 / 9)),
        ("empty prediction", (0, 0, 4, 5), (0, 0, 0, 5 / 9, 0, 1)),
        ("both full", (9, 0, 0, 0), (1, 1, 1, 1, 1, 1)),
        ("full prediction", (4, 5, 0, 0), (8 / 13, 4 / 9, 0, 4 / 9, 1, 0)),
        ("full truth", (4, 0, 5, 0), (8 / 13, 4 / 9, 0, 4 / 9, 4 / 9, 1)),
    ],
)
def test_scores_are_those_of_a_hand_count(case, counts, expected):
    assert score(*counts) == pytest.approx(dict(zip(NAMES, expected, strict=True)), rel=1e-12)


def test_a_native_images_pixels_are_counted_exactly():
    big = 6748 * 4499
    assert score(big - 1, 0, 1, 0)["sensitivity"] == (big - 1) / big


def test_protocols_pool_what_they_say():
    counts = np.array(
        [[1, 1, 0, 2], [0, 0, 2, 2], [4, 0, 0, 0], [0, 0, 0, 4], [1, 3, 0, 0], [0, 0, 0, 4]]
    )
    found = scores(counts)
    assert set(found["per_image"]) == set(NAMES)
    assert found["per_image"]["dice"] == pytest.approx((2 / 3 + 0 + 1 + 1 + 2 / 5 + 1) / 6)
    assert found["per_image"]["accuracy"] == pytest.approx((3 / 4 + 2 / 4 + 3 + 1 / 4) / 6)
    # Batches: images 0-3 together (TP 5, FP 1, FN 2), then the two left (TP 1, FP 3).
    assert found["batch_of_4"] == pytest.approx(
        {"dice": (10 / 13 + 2 / 5) / 2, "iou": (5 / 8 + 1 / 4) / 2}
    )
    # All pixels: TP 6, FP 4, FN 2.
    assert found["pooled"] == pytest.approx({"dice": 12 / 18, "iou": 6 / 12})


def test_dice_and_iou_under_the_references_protocol_are_torchmetrics():
    rng = np.random.default_rng(0)
    prediction, truth = rng.random((2, 10, 8, 8, 1)) < 0.4
    counts = np.asarray(confusion_counts(jnp.asarray(prediction), jnp.asarray(truth)))
    expected = {"dice": [], "iou": []}
    for start in range(0, 10, 4):
        pair = [torch.tensor(x[start : start + 4].astype(int)) for x in (prediction, truth)]
        expected["dice"].append(BinaryF1Score()(*pair).item())
        expected["iou"].append(BinaryJaccardIndex()(*pair).item())
    found = scores(counts)["batch_of_4"]
    assert found == pytest.approx({k: np.mean(v) for k, v in expected.items()}, abs=1e-6)
