"""State shared by all calls: the loaded engine, tokenizer and adapters, limits, counters and the stop event."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from stillhouse.teacher_service.adapters.registry import AdapterRegistry
from stillhouse.teacher_service.adapters.upload_store import UploadStore
from stillhouse.teacher_service.admission.fair_queue import Capacity, FairQueue
from stillhouse.teacher_service.admission.response_budget import ResponseBudget
from stillhouse.teacher_service.admission.throughput import Throughput
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import Engine, EngineInfo
from stillhouse.teacher_service.models.tokenizer import TextCodec


def _counter(text: str) -> Any:
    return field(default=0, metadata={"help": text})


@dataclass(kw_only=True, slots=True)
class Counters:
    """Totals since the start, with the help text of their metrics."""

    sequences_received: int = _counter("Sequences read by Score calls.")
    sequences_refused: int = _counter("Sequences answered with an error.")
    tokens_scored: int = _counter("Rows of Score's responses.")
    scoring_seconds: float = _counter("Time from reading a sequence to its response, summed over sequences.")
    samples_started: int = _counter("Samples started by Generate calls.")
    tokens_generated: int = _counter("Tokens of Generate's responses.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceState:
    """A loaded teacher."""

    config: TeacherConfig
    engine: Engine
    info: EngineInfo
    codec: TextCodec
    adapters: AdapterRegistry
    uploads: UploadStore
    counters: Counters
    capacity: Capacity
    admission: FairQueue = field(default_factory=FairQueue)
    budget: ResponseBudget = field(default_factory=ResponseBudget)
    throughput: Throughput = field(default_factory=Throughput)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service stops: calls read no further messages."""
