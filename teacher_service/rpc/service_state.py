"""State shared by all calls: the loaded engine, tokenizer and adapters, limits, counters and the stop event."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from stillhouse.teacher_service.adapters.registry import AdapterRegistry
from stillhouse.teacher_service.adapters.upload_store import UploadStore
from stillhouse.teacher_service.admission.fair_queue import Capacity, FairQueue
from stillhouse.teacher_service.admission.response_budget import ResponseBudget
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import Engine, EngineInfo
from stillhouse.teacher_service.models.tokenizer import TextCodec


@dataclass(kw_only=True, slots=True)
class Counters:
    """Totals since the start."""

    sequences_received: int = 0
    """Sequences that Score calls have read."""
    sequences_refused: int = 0
    """Sequences answered with an error."""
    tokens_scored: int = 0
    """Rows of Score's answers."""
    scoring_seconds: float = 0.0
    """Time from reading a sequence to its response, summed over sequences."""
    samples_started: int = 0
    """Samples that Generate calls have begun."""
    tokens_generated: int = 0
    """Tokens of Generate's answers."""


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
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service stops: calls read no further messages."""
