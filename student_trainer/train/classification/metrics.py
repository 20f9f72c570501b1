"""Scores of a classifier's rows, one by one, so that reports give them intervals as they do for language models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.evaluation.calibration import bin_sums
from stillhouse.protos.evaluation.f1 import f1_of_sums, f1_sums
from stillhouse.protos.evaluation.row_sums import RowSums

MAX_F1_COUNTS = 2**25
"""Counts of classes over all rows (256 MiB) up to which F1 is kept by rows; beyond it has a value and no interval."""


def class_scores(
    predicted: NDArray[np.int64], confidence: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int
) -> dict[str, RowSums]:
    """Returns accuracy, F1 and ECE of rows, [N] each, by name; `confidence` is the probability of the predicted class."""
    right = predicted == labels
    scores = {"accuracy": RowSums.mean(right.astype(np.float64))}
    if 3 * num_classes * len(labels) <= MAX_F1_COUNTS:
        scores["f1"] = RowSums(sums=f1_sums(predicted, labels, num_classes), reduction="macro_f1")
    bins = [bin_sums(confidence[row : row + 1], right[row : row + 1]) for row in range(len(labels))]
    return scores | {"ece": RowSums(sums=np.stack(bins), reduction="ece")}


def f1(predicted: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int) -> float:
    """Returns macro F1 of any number of rows."""
    counts = [
        np.bincount(each, minlength=num_classes) for each in (labels[predicted == labels], predicted, labels)
    ]
    return float(f1_of_sums(np.concatenate(counts).astype(np.float64)))


def values(scores: Mapping[str, RowSums]) -> dict[str, float]:
    """Returns the value of each score over all rows."""
    return {name: each.value for name, each in scores.items()}
