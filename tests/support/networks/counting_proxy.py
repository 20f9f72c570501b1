"""Counts, between a trainer and its teacher, the sequences that the trainer asks for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreRequest, ScoreResponse


@dataclass(kw_only=True)
class Counts:
    """Number of requested sequences, by the top_k of their stream."""

    by_top_k: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, top_k: int) -> int:
        """Sequences asked for with this top_k."""
        with self.lock:
            return self.by_top_k.get(top_k, 0)


class _Counter:
    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._top_k = 0

    def request(self, request: ScoreRequest) -> None:
        if request.HasField("config"):
            self._top_k = request.config.top_k
            return
        with self._counts.lock:
            self._counts.by_top_k[self._top_k] = self._counts.by_top_k.get(self._top_k, 0) + 1

    def response(self, response: ScoreResponse) -> ScoreResponse:
        return response


def counting_proxy(target: str) -> tuple[TeacherProxy, Counts]:
    """A proxy before `target`, to be entered as a context, and what it counts."""
    counts = Counts()
    return TeacherProxy(target, lambda: _Counter(counts)), counts
