"""Macro F1 of a classifier from counts of rows that add up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def f1_sums(predicted: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Returns hits, predictions and labels of each class for each row, [N, 3 * num_classes]; `predicted` and `labels` are [N]."""
    sums = np.zeros((len(labels), 3, num_classes))
    rows = np.arange(len(labels))
    sums[rows, 0, labels] = predicted == labels
    sums[rows, 1, predicted] = 1
    sums[rows, 2, labels] = 1
    return sums.reshape(len(labels), -1)


def f1_of_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the mean over the classes that are predicted or labels of 2 hits / (predicted + labels), [..., 3 C] to [...].

    It is scikit-learn's macro average; NaN without rows.
    """
    hits, predicted, labels = np.split(sums, 3, axis=-1)
    total = predicted + labels
    scores = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0).sum(-1)
    number = (total > 0).sum(-1)
    return np.asarray(np.divide(scores, number, out=np.full(np.shape(number), np.nan), where=number > 0))
