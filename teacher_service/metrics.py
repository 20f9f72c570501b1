"""What a teacher shows Prometheus: sequences, tokens and samples since the start, and how full the engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stillhouse.protos.telemetry.metrics import Reading
from stillhouse.teacher_service.admission.fair_queue import WHOLE
from stillhouse.teacher_service.rpc.service_state import Counters, Serving

_COUNTERS = {
    "sequences_received": "Sequences that Score calls have read.",
    "sequences_refused": "Of these, those that were answered with an error.",
    "tokens_scored": "Rows of Score's answers.",
    "scoring_seconds": "Time from reading a sequence of Score to its answer, added up over sequences.",
    "samples_started": "Samples that Generate calls have begun.",
    "tokens_generated": "Tokens of Generate's answers.",
}


class Figures:
    """Takes the readings; called from the thread that serves the page."""

    def __init__(self, counters: Counters, serving: Callable[[], Serving | None]) -> None:
        """`serving` is None while the model loads."""
        self._counters = counters
        self._serving = serving

    def __call__(self) -> Iterator[Reading]:
        """The readings as they are at present."""
        for name, text in _COUNTERS.items():
            yield Reading(name=name, help=text, value=getattr(self._counters, name), kind="counter")
        serving = self._serving()
        yield Reading(
            name="model_loaded",
            help="Whether the model answers: 1, or 0 while it loads.",
            value=serving is not None,
        )
        if serving is None:
            return
        yield Reading(
            name="engine_used",
            help="Share of the engine's capacity that is in use, in [0, 1]: how full its batches are.",
            value=1 - serving.admission.free / WHOLE,
        )
        yield Reading(
            name="items_waiting",
            help="Sequences and samples that wait for their turn.",
            value=serving.admission.total_waiting,
        )
        yield Reading(
            name="items_running",
            help="Sequences and samples that the engine has.",
            value=serving.admission.num_running,
        )
        yield Reading(
            name="unread_answer_bytes",
            help="Answers that their callers have not read.",
            value=serving.memory.num_bytes,
        )
        yield Reading(
            name="adapters_loaded", help="Adapters that can be used.", value=len(serving.adapters.adapters())
        )
