"""Places and limits of the examples of a run's evaluations among its artifacts: tokens of a few held-out rows, as JSON."""

from __future__ import annotations

FORMAT = 1
FOLDER = "evaluations/examples"
INDEX = f"{FOLDER}/index.json"
"""The evaluations that have examples, ascending by step."""
MAX_BYTES = 2 * 2**20
"""Largest file of one evaluation."""
MAX_EVALUATIONS = 32
"""Evaluations of a run whose examples are kept."""


def place_of(step: int) -> str:
    """The file of the evaluation at `step`."""
    return f"{FOLDER}/{step}.json"
