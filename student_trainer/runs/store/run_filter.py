"""Conditions on listed runs: states, which the database knows, and labels and a text, which stand in their specs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import ListRunsRequest, RunSpec
from stillhouse.student_trainer.runs.store.run_state import State

MOST_LABELS = 16
LONGEST = 200
"""Characters of a label, or of the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFilter:
    """The conditions; a run must meet all of them."""

    states: Sequence[State] = ()
    """Any of these; empty for all."""
    labels: Sequence[str] = ()
    """Each KEY or KEY=VALUE."""
    text: str = ""
    """Part of the id, the display name or the student's model, in any case."""

    @property
    def searches(self) -> bool:
        """True if specs decide."""
        return bool(self.labels or self.text)

    def takes(self, run_id: str, spec: RunSpec) -> bool:
        """True if a run has the labels and the text."""
        for label in self.labels:
            key, has_value, value = label.partition("=")
            if key not in spec.labels or (has_value and spec.labels[key] != value):
                return False
        wanted = self.text.casefold()
        return any(wanted in each.casefold() for each in (run_id, spec.display_name, spec.student.model))

    @property
    def digest(self) -> str:
        """Distinguishes filters, in tokens of pages."""
        states = ".".join(str(each) for each in sorted(set(self.states)))
        if not self.searches:
            return states
        searched = "\0".join([*sorted(set(self.labels)), "", self.text])
        return f"{states}.{hashlib.sha256(searched.encode()).hexdigest()[:16]}"


def read_filter(request: ListRunsRequest) -> RunFilter:
    """The filter of a request. Raises StillhouseError(INVALID_REQUEST)."""
    if len(request.labels) > MOST_LABELS:
        raise StillhouseError(
            Reason.INVALID_REQUEST, f"labels has {len(request.labels)} entries; give at most {MOST_LABELS}."
        )
    for field, value in [("text", request.text), *(("labels", each) for each in request.labels)]:
        if len(value) > LONGEST:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"{field} has a value of {len(value)} characters; at most {LONGEST} are searched.",
            )
    return RunFilter(states=tuple(request.states), labels=tuple(request.labels), text=request.text)
