"""One named set of rows to evaluate on, as a frozen dataclass beside those of schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stillhouse.protos.evaluation.names import MATCHES, METRICS
from stillhouse.student_trainer.config.fields import COUNT, Choices, DefaultText, MaxLength, Required


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSetConfig:
    """One named set of rows to evaluate on."""

    name: Annotated[str, Required("is required; metrics are named eval/NAME/METRIC."), MaxLength(64)] = ""
    path: Annotated[str, Required("is required: a file on the trainer's host.")] = ""
    limit: Annotated[int | None, COUNT] = None
    metrics: Annotated[
        tuple[str, ...], Choices(*METRICS), DefaultText("evaluation.metrics; accuracy with choices")
    ] = ()
    match: Annotated[str | None, Choices(*MATCHES), DefaultText("evaluation.match")] = None
