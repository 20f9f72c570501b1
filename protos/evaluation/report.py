"""The report of an evaluation as JSON: each metric of each set for teacher, student before and student after, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stillhouse.protos.evaluation.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Interval,
    interval,
    paired_interval,
)
from stillhouse.protos.evaluation.row_sums import RowSums

FORMAT = 1
PLACE = "evaluations/report.json"
"""Place of a run's report among its artifacts."""
SUBJECTS = ("teacher", "before", "after")

Scores = Mapping[str, Mapping[str, RowSums]]
"""Subject to name of the value to rows."""


def make_report(sets: Mapping[str, Scores], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report of sets by name, the held-out rows under ""; `facts` are about the run.

    `change` is after - before on the same rows, paired.
    """
    return {
        "format": FORMAT,
        **facts,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "confidence": CONFIDENCE},
        "sets": [{"name": name, **_set(scores)} for name, scores in sets.items()],
    }


def _set(scores: Scores) -> dict[str, Any]:
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    rows = max((len(each.sums) for values in scores.values() for each in values.values()), default=0)
    return {"rows": rows, "metrics": {name: _metric(name, scores) for name in names}}


def _metric(name: str, scores: Scores) -> dict[str, Any]:
    found = {subject: scores[subject][name] for subject in SUBJECTS if name in scores.get(subject, {})}
    result: dict[str, Any] = {subject: _plain(interval(each)) for subject, each in found.items()}
    if "before" in found and "after" in found:
        result["change"] = _plain(paired_interval(found["after"], found["before"]))
    signature = next((each.signature for each in found.values() if each.signature), "")
    return result | ({"signature": signature} if signature else {})


def _plain(value: Interval) -> dict[str, float | None]:
    """JSON has no NaN: null stands for it."""
    return {name: each if math.isfinite(each) else None for name, each in asdict(value).items()}
