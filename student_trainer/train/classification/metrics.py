"""Metrics of classifiers from counts that add up over batches and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

ECE_BINS = 15
"""Bins of equal width, as Guo et al. (2017) have."""


def count(probs: NDArray[np.float64], labels: NDArray[np.int64], prefix: str = "") -> Counter[str]:
    """Counts of `probs` [B, C] against `labels` [B], by names that `summarise` reads; `prefix` begins each name."""
    predicted, confidence = probs.argmax(axis=1), probs.max(axis=1)
    right = predicted == labels
    found: Counter[str] = Counter()
    found[f"{prefix}labelled"] = len(labels)
    found[f"{prefix}right"] = int(right.sum())
    for name, classes in (("hit", labels[right]), ("predicted", predicted), ("actual", labels)):
        for each, number in zip(*np.unique(classes, return_counts=True), strict=True):
            found[f"{prefix}{name}/{each}"] = int(number)
    # Bins (b / 15, (b + 1) / 15]: a confidence of 1 is in the last.
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    for each in np.unique(bins):
        inside = bins == each
        # Signed, so that the sums of batches are those of the whole.
        found[f"{prefix}gap/{each}"] = float(right[inside].sum() - confidence[inside].sum())  # type: ignore[assignment]
    return found


def summarise(counts: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Accuracy, F1 and ECE of counts; empty without labelled rows.

    f1: mean over the classes that are predicted or actual of 2 hits / (predicted + actual), as scikit-learn's macro average
    has it. ece: sum over the bins of confidence of |right - confidence| over all rows.
    """
    total = counts.get(f"{prefix}labelled", 0)
    if not total:
        return {}
    classes = {
        name.rpartition("/")[2]
        for name in counts
        if name.startswith((f"{prefix}predicted/", f"{prefix}actual/"))
    }

    def of(name: str, each: str) -> float:
        return counts.get(f"{prefix}{name}/{each}", 0)

    scores = [2 * of("hit", each) / (of("predicted", each) + of("actual", each)) for each in sorted(classes)]
    gaps = [abs(value) for name, value in counts.items() if name.startswith(f"{prefix}gap/")]
    return {
        "accuracy": counts.get(f"{prefix}right", 0) / total,
        "f1": sum(scores) / len(scores),
        "ece": sum(gaps) / total,
    }
