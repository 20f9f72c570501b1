"""Prometheus metrics of a teacher: totals of sequences, tokens and samples, and the load of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

from stillhouse.protos.telemetry.metrics import MetricSample
from stillhouse.teacher_service.admission.fair_queue import ENGINE_UNITS
from stillhouse.teacher_service.rpc.service_state import Counters, ServiceState

COUNTERS: dict[str, str] = {each.name: each.metadata["help"] for each in fields(Counters)}
BUSY = {"engine_busy_seconds": "Time in which the engine had at least one sequence or sample."}
"""Counter of the admission queue."""
GAUGES = {
    "model_loaded": "1 once the model answers, 0 while it loads.",
    "engine_used": "Share of the engine's capacity in use, in [0, 1].",
    "items_waiting": "Sequences and samples that wait for the engine.",
    "items_running": "Sequences and samples in the engine.",
    "unread_answer_bytes": "Bytes of responses not yet read by their callers.",
    "adapters_loaded": "Loaded adapters.",
}


class TeacherMetrics:
    """Collects the readings; called from the thread that serves the metrics page."""

    def __init__(self, counters: Counters, serving: Callable[[], ServiceState | None]) -> None:
        """`serving` is None while the model loads."""
        self._counters = counters
        self._serving = serving

    def __call__(self) -> Iterator[MetricSample]:
        """Yields the current readings."""
        for name, text in COUNTERS.items():
            yield MetricSample(name=name, help=text, value=getattr(self._counters, name), kind="counter")
        serving = self._serving()
        if serving is not None:
            for name, text in BUSY.items():
                yield MetricSample(name=name, help=text, value=serving.admission.busy_s, kind="counter")
        gauges = {"model_loaded": float(serving is not None)}
        if serving is not None:
            gauges |= {
                "engine_used": 1 - serving.admission.free / ENGINE_UNITS,
                "items_waiting": serving.admission.total_waiting,
                "items_running": serving.admission.num_running,
                "unread_answer_bytes": serving.budget.num_bytes,
                "adapters_loaded": len(serving.adapters.adapters()),
            }
        for name, value in gauges.items():
            yield MetricSample(name=name, help=GAUGES[name], value=value)
