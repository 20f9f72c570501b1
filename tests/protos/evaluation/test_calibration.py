"""The calibration error is its definition, and adds up over rows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stillhouse.protos.evaluation.calibration import NUM_BINS, bin_sums, ece_of_sums


def ece(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    return float(ece_of_sums(bin_sums(confidence, correct)))


def test_the_error_is_its_definition() -> None:
    random = np.random.default_rng(0)
    confidence, correct = random.random(2000), random.random(2000) < 0.4
    confidence[:3] = 0.0, 1.0, 1 / 3  # the ends, and an edge that belongs to the bin below
    expected = 0.0
    for number in range(NUM_BINS):
        low, high = number / NUM_BINS, (number + 1) / NUM_BINS
        inside = (confidence > low) & (confidence <= high) | ((number == 0) & (confidence == 0))
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert ece(confidence, correct) == pytest.approx(expected, abs=1e-12)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    random = np.random.default_rng(1)
    confidence, correct = random.random(300), random.random(300) < 0.5
    parts = bin_sums(confidence[:100], correct[:100]) + bin_sums(confidence[100:], correct[100:])
    assert float(ece_of_sums(parts)) == pytest.approx(ece(confidence, correct))


def test_no_predictions_have_no_error() -> None:
    assert np.isnan(ece(np.zeros(0), np.zeros(0, np.bool_)))
