"""Parses journal lines of a run into changes for the store; malformed and late lines are logged and skipped.

A late line is one of a replaced attempt, whose process resumed in the middle of a write on a file system without locks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status

from stillhouse.protos.errors import from_json
from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, Run, RunSpec
from stillhouse.student_trainer.config.settled.layer_pairs import LayerChoice, settle_spec_layers
from stillhouse.student_trainer.config.settled.target_choice import TargetChoice, settle_spec
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.store.queries import STEP_METRICS, to_bytes

log = structlog.get_logger(__name__)

OUTCOMES = ("completed", "stopped", "failed")
"""Event kinds that report the end of a process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedOutcome:
    """Outcome that a process reported at its end."""

    kind: str
    error: Status | None


@dataclass(kw_only=True, slots=True)
class JournalBatch:
    """Changes from some lines of both journals, in order."""

    offsets: dict[str, int]
    """Columns of the store: bytes read of each journal."""
    started: bool = False
    """True if the process has started to train."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Columns whose change is an event of the run."""
    choices: dict[str, TargetChoice] = field(default_factory=dict)
    """Targets that the run settled, by the path of their loss."""
    layers: dict[str, LayerChoice] = field(default_factory=dict)
    """Layers of hidden states that the run settled, likewise."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Columns derived from metrics."""
    metrics: list[tuple[int, MetricPoint]] = field(default_factory=list)
    """Attempt and point."""
    outcomes: list[tuple[int, ReportedOutcome]] = field(default_factory=list)
    """Attempt and outcome."""

    @property
    def empty(self) -> bool:
        """True if only offsets changed."""
        return not (self.started or self.changes or self.settles or self.metrics or self.outcomes)

    @property
    def settles(self) -> bool:
        """True if the run settled something."""
        return bool(self.choices or self.layers)

    def settled(self, effective_spec: bytes) -> bytes:
        """An effective spec, serialised, with what the run settled."""
        spec = RunSpec.FromString(effective_spec)
        settle_spec(spec, self.choices)
        settle_spec_layers(spec, self.layers)
        return to_bytes(spec)


def read_batch(run_dir: RunDir, offsets: tuple[int, int], attempt: int) -> JournalBatch:
    """Reads the journals from `offsets`, bytes of events and metrics, during `attempt`."""
    # Events first, so that no metric point written before an event is missed.
    event_lines, events_offset = run_dir.read_lines("events.jsonl", offsets[0])
    metric_lines, metrics_offset = run_dir.read_lines("metrics.jsonl", offsets[1])
    batch = JournalBatch(offsets={"events_offset": events_offset, "metrics_offset": metrics_offset})
    for lines, take in ((event_lines, _take_event), (metric_lines, _take_metrics)):
        _take(run_dir, _timely(run_dir, lines, attempt), batch, take)
    return batch


def _timely(run_dir: RunDir, lines: Sequence[Mapping[str, Any]], attempt: int) -> Iterator[Mapping[str, Any]]:
    """Skips lines of earlier attempts, whose own lines were all read before this one began."""
    for line in lines:
        number = line.get("attempt")
        if isinstance(number, int) and number < attempt:
            log.warning("late line skipped", run=run_dir.path.name, line=dict(line), attempt=attempt)
        else:
            yield line


def _take(run_dir: RunDir, lines: Iterable[Mapping[str, Any]], batch: JournalBatch, take: Any) -> None:
    for line in lines:
        try:
            take(line, batch)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            log.warning("journal line skipped", run=run_dir.path.name, line=dict(line), error=str(error))


def _take_event(line: Mapping[str, Any], batch: JournalBatch) -> None:
    kind = line["kind"]
    if kind == "started":
        total_steps, step = _count(line["total_steps"]), _count(line.get("step", 0))
        batch.started = True
        batch.changes |= {"total_steps": total_steps, "condition": Run.CONDITION_UNSPECIFIED}
        batch.progress["step"] = step
    elif kind == "checkpoint":
        batch.changes["latest_checkpoint"] = _count(line["step"])
    elif kind == "settled":
        targets, layers = line.get("targets", {}), line.get("layers", {})
        batch.choices |= {str(path): TargetChoice.from_json(value) for path, value in targets.items()}
        batch.layers |= {str(path): LayerChoice.from_json(value) for path, value in layers.items()}
    elif kind == "condition":
        batch.changes["condition"] = _condition(line["condition"])
    elif kind in OUTCOMES:
        if kind == "completed" and "step" in line:  # steps of an evaluation have no metrics of their own
            batch.progress["step"] = _count(line["step"])
        error = from_json(line["error"]) if kind == "failed" else None
        batch.outcomes.append((_count(line["attempt"]), ReportedOutcome(kind=kind, error=error)))


def _count(value: float) -> int:
    """Converts to an integer that the store can hold. Raises ValueError."""
    number = int(value)
    if not 0 <= number < 2**63:
        raise ValueError(f"{value} is not a count")
    return number


def _condition(name: str | None) -> Run.Condition.ValueType:
    """The condition by name, with or without the enum's prefix; empty if the run makes progress."""
    return Run.Condition.Value(f"CONDITION_{(name or 'UNSPECIFIED').removeprefix('CONDITION_')}")


def _take_metrics(line: Mapping[str, Any], batch: JournalBatch) -> None:
    values = {str(name): float(value) for name, value in line["values"].items()}
    time = Timestamp()
    time.FromJsonString(line["time"])
    attempt, step = _count(line["attempt"]), _count(line["step"])
    progress: dict[str, Any] = {} if STEP_METRICS.isdisjoint(values) else {"step": step}
    if "train/trained_tokens" in values:
        progress["trained_tokens"] = _count(values["train/trained_tokens"])
    for name in ("train/tokens_per_second", "cache/tokens_per_second"):
        if math.isfinite(values.get(name, math.nan)):
            progress["tokens_per_second"] = values[name]
    batch.metrics.append((attempt, MetricPoint(step=step, values=values, attempt=attempt, time=time)))
    batch.progress |= progress
