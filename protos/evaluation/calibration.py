"""Expected calibration error: the gap between how sure predictions are and how often they are right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15
"""Bins of equal width over [0, 1], as in Guo et al. 2017, "On Calibration of Modern Neural Networks"."""


def bin_sums(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Returns number, sum of confidences and number of right ones of each bin, flat, [3 * NUM_BINS].

    `confidence` [N] is the probability of the predicted class, in [0, 1]; bin b holds (b / NUM_BINS, (b + 1) / NUM_BINS].
    """
    places = np.clip(np.ceil(confidence.astype(np.float64) * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = [
        np.bincount(places, weights=weights, minlength=NUM_BINS)
        for weights in (np.ones(len(places)), confidence, correct)
    ]
    return np.concatenate(counts).astype(np.float64)


def ece_of_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns sum_b (n_b / N) |accuracy_b - confidence_b| of sums of `bin_sums`, [..., 3 * NUM_BINS] to [...]."""
    number, confidence, correct = np.split(sums, 3, axis=-1)
    gaps = np.abs(correct - confidence).sum(-1)
    total = number.sum(-1)
    return np.asarray(np.divide(gaps, total, out=np.full(np.shape(total), np.nan), where=total > 0))
