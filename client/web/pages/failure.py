"""Explains the failure of a run or a request: what happened, what it means, what to do."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.client.core.errors import explain
from stillhouse.client.trainer.advice import next_step
from stillhouse.protos.errors import StillhouseError, from_status
from stillhouse.protos.stillhouse.v1.run_pb2 import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Parts of the explanation."""

    reason: str
    message: str
    meaning: str
    remedy: str
    fields: list[tuple[str, str]]
    """Wrong fields and what is wrong with them."""
    step: str = ""
    """The next step for this run, with the command."""


def failure_of(error: StillhouseError, step: str = "") -> Failure:
    """The explanation of an error."""
    meaning, remedy = explain(error.reason)
    return Failure(
        reason=str(error.reason),
        message=error.message,
        meaning=meaning,
        remedy=remedy,
        fields=[(each.field, each.description) for each in error.violations],
        step=step,
    )


def failure_of_run(run: Run) -> Failure | None:
    """The explanation of a FAILED run; None for others."""
    if run.state != Run.STATE_FAILED:
        return None
    return failure_of(from_status(run.error), next_step(run))
