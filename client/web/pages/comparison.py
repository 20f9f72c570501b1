"""Final metrics of several runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.client.web.api.messages import invalid
from stillhouse.client.web.pages.text import number
from stillhouse.protos.stillhouse.v1.run_pb2 import QueryMetricsResponse

MOST_RUNS = 8
HIDDEN = ("data/", "train/epoch", "train/trained_tokens")


def check_runs(runs: Sequence[str]) -> list[str]:
    """The ids without repetitions. Raises StillhouseError(INVALID_REQUEST) unless there are 2 to MOST_RUNS."""
    different = list(dict.fromkeys(runs))
    if not 2 <= len(different) <= MOST_RUNS:
        raise invalid("run", f"{len(different)} runs are named; choose 2 to {MOST_RUNS} different ones.")
    return different


def final_metrics(responses: Sequence[QueryMetricsResponse]) -> list[tuple[str, list[str]]]:
    """Metric, and its last value in each run, "" where it has none; evaluations first."""
    last = [{each.key: each.values[-1] for each in one.series if each.values} for one in responses]
    names = sorted({name for each in last for name in each if not name.startswith(HIDDEN)})
    names.sort(key=lambda name: not name.startswith("eval/"))
    return [(name, [number(each[name]) if name in each else "" for each in last]) for name in names]
