"""Calibration against counts by hand, torchmetrics and SciPy on exact logits."""

import any_torchvision  # noqa: F401  before torchmetrics, which asks for it
import numpy as np
import pytest
import torch
from scipy import optimize
from torchmetrics.classification import BinaryCalibrationError

from jaxunet.learning.bootstrap import calibration_intervals
from jaxunet.learning.calibration import (
    THRESHOLDS,
    best_threshold,
    calibration_error,
    count_logits,
    count_thresholds,
    counts_by_threshold,
    cross_entropy,
    described,
    fit_temperature,
    reliability,
    tempered,
)

RNG = np.random.default_rng(0)
TRUTH = RNG.random((5, 24, 20)) < 0.3
# Twice too sure, and with a few pixels far out.
LOGITS = (2 * (RNG.normal(0, 1.5, TRUTH.shape) + np.where(TRUTH, 1, -1.2))).astype(np.float32)
LOGITS[0, 0, :4] = [90, -90, 150, -150]
PROBABILITIES = (1 / (1 + np.exp(-LOGITS.astype(float)))).astype(np.float32)


def test_the_calibration_error_is_that_of_a_count_by_hand_and_of_torchmetrics():
    flat, lesion = PROBABILITIES.ravel(), TRUTH.ravel()
    by_hand = 0.0
    for low in range(15):
        here = (flat >= low / 15) & ((flat < (low + 1) / 15) | ((low == 14) & (flat == 1)))
        if here.any():
            by_hand += here.mean() * abs(flat[here].mean() - lesion[here].mean())
    found = float(calibration_error(reliability(PROBABILITIES, TRUTH).sum(axis=0)))
    assert found == pytest.approx(by_hand, rel=1e-6)
    theirs = BinaryCalibrationError(n_bins=15)(torch.tensor(flat), torch.tensor(lesion).int())
    assert found == pytest.approx(float(theirs), rel=1e-4)
    assert found > 0.05


def test_bins_say_what_is_in_them():
    probabilities, truth = np.float32([[[0.5, 0.5, 1, 0]]]), np.array([[[1, 0, 1, 0]]]) > 0
    bins = described(reliability(probabilities, truth))
    filled = {round(each["from"], 2): each for each in bins["bins"] if each["pixels"]}
    assert [filled[low]["pixels"] for low in (0, 0.47, 0.93)] == [1, 2, 1]
    assert filled[0.47]["lesion_share"] == filled[0.47]["mean_probability"] == 0.5
    assert bins["expected_calibration_error"] == 0
    assert bins["bins"][1]["lesion_share"] is None


def test_intervals_are_of_pooled_errors_and_of_their_difference():
    wrong = reliability(PROBABILITIES, TRUTH)
    right = reliability(np.where(TRUTH, 0.9, 0.1).astype(np.float32), TRUTH)
    found = calibration_intervals({"right": right, "wrong": wrong})
    assert found["right"] == pytest.approx([0.1, 0.1])
    low, high = found["wrong"]
    errors = [float(calibration_error(each)) for each in wrong]
    assert min(errors) / 2 < low < float(calibration_error(wrong.sum(0))) < high
    low, high = found["wrong less right"]
    assert low == pytest.approx(found["wrong"][0] - 0.1)
    assert high == pytest.approx(found["wrong"][1] - 0.1)


def test_the_counts_of_every_threshold_are_those_of_its_masks():
    table = count_thresholds(PROBABILITIES, TRUTH)
    dice = []
    for threshold, counts in zip(THRESHOLDS, counts_by_threshold(table), strict=True):
        mask = np.greater(PROBABILITIES, np.float32(threshold))
        for image in range(len(mask)):
            p, t = mask[image], TRUTH[image]
            by_hand = [(p & t).sum(), (p & ~t).sum(), (~p & t).sum(), (~p & ~t).sum()]
            np.testing.assert_array_equal(counts[image], by_hand)
        both = (mask & TRUTH).sum((1, 2))
        dice.append((2 * both / (mask.sum((1, 2)) + TRUTH.sum((1, 2)))).mean())
    best, found = best_threshold(table)
    np.testing.assert_allclose(found, dice)
    assert best == THRESHOLDS[np.argmax(dice)] != 0.5


def test_of_equally_good_thresholds_the_one_nearest_to_a_half_is_taken():
    sure = np.where(TRUTH, 0.9, 0.2).astype(np.float32)
    assert best_threshold(count_thresholds(sure, TRUTH))[0] == 0.5
    unsure = np.where(TRUTH, 0.4, 0.2).astype(np.float32)
    assert best_threshold(count_thresholds(unsure, TRUTH))[0] == 0.39


def test_the_temperature_is_scipys_on_exact_logits():
    signed = np.where(TRUTH, -LOGITS.astype(float), LOGITS)
    least = optimize.minimize_scalar(
        lambda t: np.logaddexp(0, signed / t).mean(), bounds=(0.1, 10), options={"xatol": 1e-9}
    )
    parts = [count_logits(LOGITS[:2], TRUTH[:2]), count_logits(LOGITS[2:], TRUTH[2:])]
    found = fit_temperature(sum(parts))
    assert found == pytest.approx(least.x, rel=1e-4)
    assert found > 1.5
    assert cross_entropy(LOGITS, TRUTH, found).mean() == pytest.approx(least.fun)
    assert cross_entropy(LOGITS, TRUTH).mean() == pytest.approx(np.logaddexp(0, signed).mean())


def test_without_a_least_in_reach_the_temperature_is_the_nearer_end():
    right = np.where(TRUTH, 3.0, -3.0).astype(np.float32)
    assert fit_temperature(count_logits(right, TRUTH)) == 0.05
    assert fit_temperature(count_logits(-right, TRUTH)) == 20


def test_a_threshold_moves_with_the_temperature_so_that_masks_stay():
    warm = 1 / (1 + np.exp(-LOGITS.astype(float) / 1.7))
    moved = tempered(0.3, 1.7)
    np.testing.assert_array_equal(warm > moved, PROBABILITIES > 0.3)
    assert moved != pytest.approx(0.3, abs=0.05)
    assert tempered(0.5, 3) == 0.5
