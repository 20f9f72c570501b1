"""What every call shares: a loaded engine with its tokenizer and adapters, limits, counters, and the sign to stop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from stillhouse.teacher_service.adapters.registry import AdapterRegistry
from stillhouse.teacher_service.adapters.upload_store import AdapterSpool
from stillhouse.teacher_service.admission.fair_queue import Admission, Capacity
from stillhouse.teacher_service.admission.response_budget import AnswerMemory
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import Engine, EngineInfo
from stillhouse.teacher_service.models.tokenizer import TextCodec


@dataclass(kw_only=True, slots=True)
class Counters:
    """Totals since the start."""

    sequences_received: int = 0
    """Sequences that Score calls have read."""
    sequences_refused: int = 0
    """Of these, those that were answered with an error."""
    tokens_scored: int = 0
    """Rows of Score's answers."""
    scoring_seconds: float = 0.0
    """From reading a sequence to its answer, added up over sequences."""
    samples_started: int = 0
    """Samples that Generate calls have begun."""
    tokens_generated: int = 0
    """Tokens of Generate's answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A teacher that answers."""

    config: TeacherConfig
    engine: Engine
    info: EngineInfo
    codec: TextCodec
    adapters: AdapterRegistry
    spool: AdapterSpool
    counters: Counters
    capacity: Capacity
    admission: Admission = field(default_factory=Admission)
    memory: AnswerMemory = field(default_factory=AnswerMemory)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service stops: calls read nothing more."""
