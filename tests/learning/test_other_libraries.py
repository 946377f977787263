"""Which number of other libraries is which of ours: the table in experiments/README.md.

metrax is not among the test requirements, as it would raise the oldest versions of others that
are allowed: `pip install google-metrax` to test against it too.
"""

import warnings

import any_torchvision  # noqa: F401  before those that ask for it
import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex
from torchmetrics.segmentation import DiceScore, MeanIoU

from jaxunet.learning.boundary import boundary_scores
from jaxunet.learning.metrics import THRESHOLD_JACCARD, per_image, scores

BATCHES = [slice(0, 4), slice(4, 8), slice(8, 10)]
APPROX = {"rel": 1e-5}  # theirs is float32


def lesions(seed: int) -> np.ndarray:
    """Ten masks of 24 x 32 pixels, of different sizes, none empty."""
    noise = np.random.default_rng(seed).standard_normal((10, 24, 32))
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3))
    return smooth > np.quantile(smooth, 0.75, axis=(1, 2), keepdims=True) * np.linspace(
        0.2, 1.1, 10
    ).reshape(-1, 1, 1)


TRUTH = lesions(1)
PREDICTION = np.where(lesions(3) & lesions(5), ~TRUTH, TRUTH)
PAIRS = (PREDICTION & TRUTH, PREDICTION & ~TRUTH, ~PREDICTION & TRUTH, ~PREDICTION & ~TRUTH)
OURS = scores(np.stack([pair.sum((1, 2)) for pair in PAIRS], axis=1))


def in_torch(masks: np.ndarray) -> torch.Tensor:
    return torch.tensor(masks[:, None].astype(np.int64))


P, T = in_torch(PREDICTION), in_torch(TRUTH)
EMPTY = torch.zeros(1, 1, 4, 4, dtype=torch.int64)


def test_no_two_of_our_numbers_are_alike_here() -> None:
    values = [OURS[p][n] for p in OURS for n in OURS[p] if n in ("dice", "iou")]
    values.append(OURS["per_image"]["threshold_jaccard"])
    assert np.diff(sorted(values)).min() > 1e-3


def test_torchmetrics_classification_pools_what_it_is_given_at_once() -> None:
    def over(batches: list[slice]) -> dict[str, float]:
        pairs = {"dice": BinaryF1Score(), "iou": BinaryJaccardIndex()}
        return {
            name: float(np.mean([metric(P[b], T[b]).item() for b in batches]))
            for name, metric in pairs.items()
        }

    assert over([slice(None)]) == pytest.approx(OURS["pooled"], **APPROX)
    assert over(BATCHES) == pytest.approx(OURS["batch_of_4"], **APPROX)
    # An object that is updated batch by batch, and computed at the end, pools them all.
    metric = BinaryF1Score()
    for batch in BATCHES:
        metric.update(P[batch], T[batch])
    assert metric.compute().item() == pytest.approx(OURS["pooled"]["dice"], **APPROX)
    assert BinaryF1Score()(EMPTY, EMPTY) == 0
    assert BinaryF1Score(zero_division=1)(EMPTY, EMPTY) == 1


def test_torchmetrics_segmentation_means_over_images() -> None:
    form = {"num_classes": 1, "input_format": "one-hot"}
    dice = DiceScore(average="micro", **form)
    iou = MeanIoU(**form)
    for batch in BATCHES:
        dice.update(P[batch], T[batch])
        iou.update(P[batch], T[batch])
    assert dice.compute().item() == pytest.approx(OURS["per_image"]["dice"], **APPROX)
    assert iou.compute().item() == pytest.approx(OURS["per_image"]["iou"], **APPROX)
    pooled = DiceScore(average="micro", aggregation_level="global", **form)
    assert pooled(P, T).item() == pytest.approx(OURS["pooled"]["dice"], **APPROX)
    # With the background as a second class it is another number.
    both = MeanIoU(num_classes=2, input_format="index")(P[:, 0], T[:, 0]).item()
    assert all(abs(both - each["iou"]) > 1e-3 for each in OURS.values())


def test_monai_means_over_images() -> None:
    metrics = pytest.importorskip("monai.metrics")
    dice, iou = metrics.DiceMetric(ignore_empty=False), metrics.MeanIoU(ignore_empty=False)
    for batch in BATCHES:
        dice(P[batch], T[batch])
        iou(P[batch], T[batch])
    assert dice.aggregate().item() == pytest.approx(OURS["per_image"]["dice"], **APPROX)
    each = iou.aggregate("none")
    jaccard = each.where(each >= THRESHOLD_JACCARD, 0).mean().item()
    found = {"iou": iou.aggregate().item(), "threshold_jaccard": jaccard}
    assert found == pytest.approx({name: OURS["per_image"][name] for name in found}, **APPROX)
    assert metrics.DiceMetric(ignore_empty=False)(EMPTY, EMPTY).item() == 1

    names = ["f1 score", "threat score", "accuracy", "sensitivity", "specificity"]
    matrix = metrics.ConfusionMatrixMetric(metric_name=names, reduction="sum")
    matrix(P, T)
    pooled = [value.item() for value in matrix.aggregate()]
    assert pooled[:2] == pytest.approx(list(OURS["pooled"].values()), **APPROX)
    matrix = metrics.ConfusionMatrixMetric(metric_name=names, compute_sample=True)
    matrix(P, T)
    found = dict(
        zip(
            ("dice", "iou", "accuracy", "sensitivity", "specificity"),
            (value.item() for value in matrix.aggregate()),
            strict=True,
        )
    )
    assert found == pytest.approx({name: OURS["per_image"][name] for name in found}, **APPROX)


def test_monais_boundary_scores_are_ours() -> None:
    metrics = pytest.importorskip("monai.metrics")
    ours = np.stack(
        [boundary_scores(p, t, 2.0) for p, t in zip(PREDICTION, TRUTH, strict=True)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own, of options that are not given
        hd95 = metrics.compute_hausdorff_distance(P, T, include_background=True, percentile=95)
        nsd = metrics.compute_surface_dice(P, T, [2.0], include_background=True)
    np.testing.assert_allclose(ours, torch.cat([hd95, nsd], 1).numpy(), rtol=1e-5)
    assert ours[:, 0].min() > 0
    assert 0 < ours[:, 1].min() < ours[:, 1].max() < 1


def test_segmentation_models_pytorch_says_by_its_reduction() -> None:
    metrics = pytest.importorskip("segmentation_models_pytorch.metrics")
    stats = metrics.get_stats(P, T, mode="binary")

    def found(reduction: str) -> dict[str, float]:
        each = {"dice": metrics.f1_score, "iou": metrics.iou_score}
        return {k: v(*stats, reduction=reduction).item() for k, v in each.items()}

    for ours, reductions in (
        ("pooled", ("micro", "macro")),
        ("per_image", ("micro-imagewise", "macro-imagewise")),
    ):
        expected = {name: OURS[ours][name] for name in ("dice", "iou")}
        for reduction in reductions:
            assert found(reduction) == pytest.approx(expected, **APPROX)
    iou = metrics.iou_score(*stats, reduction="none")
    jaccard = iou.where(iou >= THRESHOLD_JACCARD, 0).mean().item()
    assert jaccard == pytest.approx(OURS["per_image"]["threshold_jaccard"], **APPROX)
    nothing = metrics.get_stats(EMPTY, EMPTY, mode="binary")
    score = metrics.f1_score(*nothing, reduction="micro-imagewise", zero_division=1)
    assert score.item() == per_image(np.array([[0, 0, 0, 16]]))["dice"][0] == 1


def test_metrax_pools_dice_over_all_and_iou_over_a_batch() -> None:
    metrax = pytest.importorskip("metrax", reason="google-metrax is not installed")
    dice, iou = metrax.Dice.empty(), metrax.IoU.empty()
    for batch in BATCHES:
        pair = PREDICTION[batch].astype(np.int32), TRUTH[batch].astype(np.int32)
        dice = dice.merge(metrax.Dice.from_model_output(*pair))
        classes = {"num_classes": 2, "target_class_ids": np.array([1])}
        iou = iou.merge(metrax.IoU.from_model_output(*pair, **classes))
    assert float(dice.compute()) == pytest.approx(OURS["pooled"]["dice"], **APPROX)
    assert float(iou.compute()) == pytest.approx(OURS["batch_of_4"]["iou"], **APPROX)
    by_batch = [
        metrax.Dice.from_model_output(PREDICTION[b], TRUTH[b]).compute() for b in BATCHES
    ]
    assert np.mean(by_batch) == pytest.approx(OURS["batch_of_4"]["dice"], **APPROX)
    whole = metrax.IoU.from_model_output(PREDICTION, TRUTH, **classes)
    assert float(whole.compute()) == pytest.approx(OURS["pooled"]["iou"], **APPROX)
