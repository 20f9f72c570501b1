"""Sends cases to a service, some at once, and keeps what it answered by rpc; a bug of the service is kept whole."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.message import Message

from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2
from tests.fuzz.rpcs import Case

AT_ONCE = 6
BUGS = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE})
"""Codes that no request may be answered with."""
BAD_ITEMS = frozenset({grpc.StatusCode.INTERNAL.value[0], grpc.StatusCode.UNKNOWN.value[0]})
UNARY_S = 60.0
"""A service that says nothing for so long hangs."""
STREAM_S = 1.5
"""Streams that go on are cut off by their caller."""
FOLLOW_S = 0.3
"""So are those that only end with a run."""
KEPT_BUGS = 20
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass(slots=True)
class Figures:
    """Outcomes of the cases of one rpc."""

    cases: int = 0
    structures: set[int] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Report:
    """Outcomes of all cases."""

    by_rpc: dict[str, Figures] = field(default_factory=dict)
    bugs: list[str] = field(default_factory=list)

    def add(self, case: Case, outcome: str) -> None:
        figures = self.by_rpc.setdefault(case.method.name, Figures())
        figures.cases += 1
        figures.structures.add(case.structure)
        figures.outcomes[outcome] += 1

    def bug(self, case: Case, what: str) -> None:
        if len(self.bugs) < KEPT_BUGS:
            sent = " ".join(payload[:200].hex() for payload in case.payloads[:4])
            self.bugs.append(f"{case.method.name}: {what}\n  again with: {case.repeats}\n  sent: {sent}")

    def lines(self) -> Iterator[str]:
        """A table: rpc, cases, distinct structures, answers."""
        yield f"{'rpc':<18}{'cases':>8}{'structures':>12}  answers"
        for name, each in sorted(self.by_rpc.items()):
            answers = ", ".join(f"{code} {count}" for code, count in each.outcomes.most_common())
            yield f"{name:<18}{each.cases:>8}{len(each.structures):>12}  {answers}"
        total = sum(each.cases for each in self.by_rpc.values())
        distinct = sum(len(each.structures) for each in self.by_rpc.values())
        yield f"{'all':<18}{total:>8}{distinct:>12}"


Look = Callable[[Case, Message], str | None]
"""Describes the fault of an answer; None if it has none."""


def send(target: str, cases: Iterable[Case], report: Report, look: Look) -> None:
    """Sends every case; AT_ONCE calls are under way at any time."""
    waiting, lock = iter(cases), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                case = next(waiting, None)
            if case is None:
                return
            outcome = _call(channel, case, report, look)
            with lock:
                report.add(case, outcome)

    # grpc.aio loses the status of a call that ends while its caller still writes.
    with grpc.insecure_channel(target, options=_OPTIONS) as channel, ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(work) for _ in range(AT_ONCE)]:
            done.result()


def _call(channel: grpc.Channel, case: Case, report: Report, look: Look) -> str:
    """Name of the status that the call ended with."""
    answer_kind = case.method.output_type._concrete_class  # type: ignore[attr-defined]
    streams = (case.method.client_streaming, case.method.server_streaming)
    make = getattr(channel, "_".join("stream" if each else "unary" for each in streams))
    call_of = make(case.path, request_serializer=bytes, response_deserializer=answer_kind.FromString)
    patience_s = UNARY_S
    if case.method.server_streaming:
        patience_s = FOLLOW_S if case.method.name in ("WatchRun", "StreamLogs") else STREAM_S
    request: Any = iter(case.payloads) if case.method.client_streaming else case.payloads[0]
    try:
        answers = call_of(request, timeout=patience_s)
        for answer in answers if case.method.server_streaming else [answers]:
            _check(case, answer, report, look)
    except grpc.RpcError as error:
        call: Any = error
        hung = call.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not case.method.server_streaming
        if call.code() in BUGS or hung:
            report.bug(case, f"{call.code().name}: {call.details()}")
        return str(call.code().name)
    return "OK"


def _check(case: Case, answer: Any, report: Report, look: Look) -> None:
    """Looks for bugs within an answer that as a whole is none."""
    items: Sequence[Any] = ()
    if isinstance(answer, teacher_pb2.ScoreResponse):
        items = answer.results
    elif isinstance(answer, teacher_pb2.GenerateResponse):
        items = answer.chunks
    for item in items:
        if item.HasField("error") and item.error.code in BAD_ITEMS:
            report.bug(case, f"an item: {item.error.message}")
    if isinstance(answer, run_pb2.Run) and answer.error.code in BAD_ITEMS:
        report.bug(case, f"a run: {answer.error.message}")
    wrong = look(case, answer)
    if wrong is not None:
        report.bug(case, wrong)


def faults(log_path: Path) -> list[str]:
    """Lines of a service's log that only a bug explains. gRPC logs by itself of header values that are no text."""
    found = []
    for line in log_path.read_text(errors="replace").splitlines():
        if ('"exception"' in line and '"Invalid encoding' not in line) or "internal error" in line:
            found.append(line[-3000:])
    return found[:5]


def resident_bytes(pid: int) -> int:
    """Memory of a service's own process, without the training processes that it started."""
    assert os.getpid() != pid
    return int(psutil.Process(pid).memory_info().rss)
