"""Paired statistics of the distillation experiment, and its Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from examples.demo.comparison import RunScores, Scores

METRICS = {"kl": "held-out KL", "perplexity": "perplexity", "agreement": "agreement"}
LOWER_IS_BETTER = {"kl": True, "perplexity": True, "agreement": False}
# Two-sided 95 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Mean of paired differences with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of first - second over the seeds that both have, with Student's t; infinitely wide for a single pair."""
    num_pairs = min(len(first), len(second))
    differences = np.array(first[:num_pairs]) - np.array(second[:num_pairs])
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    quantile = T_QUANTILES[count - 2] if count - 1 <= len(T_QUANTILES) else 1.96
    half = quantile * float(differences.std(ddof=1)) / math.sqrt(count)
    return Interval(mean=mean, low=mean - half, high=mean + half)


def column(results: Sequence[RunScores], metric: str) -> list[float]:
    """One metric of the trained students."""
    return [getattr(result.after, metric) for result in results]


def is_better(first: Sequence[RunScores], second: Sequence[RunScores], metric: str) -> bool:
    """True if the complete interval of first - second is on the better side of 0."""
    interval = paired_interval(column(first, metric), column(second, metric))
    return interval.high < 0 if LOWER_IS_BETTER[metric] else interval.low > 0


def students_table(
    before: Sequence[Scores], results: Mapping[str, Sequence[RunScores]], learning_rates: Mapping[str, float]
) -> str:
    """Mean and standard deviation over seeds, a row for each kind of student."""
    rows = [_row("before training", before, "")]
    rows += [
        _row(method, [result.after for result in measured], f"{learning_rates[method]:g}")
        for method, measured in results.items()
    ]
    header = f"| student | {' | '.join(METRICS.values())} | learning rate |"
    return "\n".join([header, "|---" * (len(METRICS) + 2) + "|", *rows])


def _row(name: str, scores: Sequence[Scores], learning_rate: str) -> str:
    cells = []
    for metric in METRICS:
        values = np.array([getattr(score, metric) for score in scores])
        deviation = values.std(ddof=1) if len(values) > 1 else 0.0
        cells.append(f"{values.mean():.4f} ± {deviation:.4f}")
    return f"| {name} | {' | '.join(cells)} | {learning_rate} |"


def differences_table(results: Mapping[str, Sequence[RunScores]], pairs: Sequence[tuple[str, str]]) -> str:
    """Paired differences over seeds with 95 % t-intervals, a row for each of `pairs`."""
    rows = [
        f"| {first} - {second} | "
        + " | ".join(
            str(paired_interval(column(results[first], metric), column(results[second], metric)))
            for metric in METRICS
        )
        + " |"
        for first, second in pairs
    ]
    header = f"| paired difference | {' | '.join(METRICS.values())} |"
    return "\n".join([header, "|---" * (len(METRICS) + 1) + "|", *rows])
