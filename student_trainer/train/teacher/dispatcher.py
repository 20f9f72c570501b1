"""Work that goes out to a teacher's services and comes back by id: what ScoreStream and TextStream have in common.

Every piece submitted is answered once, however often services break: what one of them leaves unanswered goes to another,
or waits until one answers. Each service has a lane of threads of its own; the caller's thread submits, takes and waits.
"""

from __future__ import annotations

import abc
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import grpc
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoRequest
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.student_trainer.train.process.waiting import POLL_S, Patience
from stillhouse.student_trainer.train.teacher.endpoints import Endpoint, backoff_s, is_passing, is_suspicious
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

log = structlog.get_logger()

SILENCE_S = 30.0
"""If nothing at all is answered for so long, that counts as no teacher."""
PROBE_AFTER_S = 10.0
"""A service that owes something and has been silent for so long is asked whether it is there."""
PROBE_EVERY_S = 1.0
"""Between two looks at who is silent."""
PROBE_TIMEOUT_S = 10.0
"""Time that it has to say so; then what it owes goes to another."""
REFUSED_RETRY_S = 20.0
"""A service that is not the run's teacher is looked at again after so long: somebody may have put it right."""
MAX_ITEM_TIMEOUTS = 3
"""Times that a piece may be answered with ITEM_TIMEOUT before the run gives up on it."""
MAX_FRUITLESS_BREAKS = 5
"""Times in a row that a service may break with what looks like a bug, and without an answer."""
CLOSE_S = 5.0
"""Time that the threads get to end."""


class Piece(Protocol):
    """What is asked in one piece."""

    @property
    def place(self) -> str:
        """File and row, which errors name."""
        ...

    @property
    def cost(self) -> int:
        """Tokens that it makes a teacher compute."""
        ...


P = TypeVar("P", bound=Piece)
A = TypeVar("A")


@dataclass(eq=False, kw_only=True, slots=True)
class Lane:
    """What one service has to do for one stream. Guarded by the stream's lock."""

    endpoint: Endpoint
    work: threading.Condition
    """Notified when there is something to do, and when the stream is closed."""
    is_open: bool
    """Whether it is given work; not while it is broken."""
    queue: deque[int] = field(default_factory=deque)
    """Given to it, and not sent."""
    calls: set[grpc.Call] = field(default_factory=set)
    refused: StillhouseError | None = None
    """Why it cannot be used, if waiting alone will not help."""
    last_answer: float = field(default_factory=time.monotonic)
    num_owed: int = 0
    """Given to it, and unanswered."""
    num_sent: int = 0
    num_answered: int = 0
    probe: Any = None
    """The future of the question whether it is there."""
    hangs: bool = False
    """Whether it gave no answer to that."""


class Lanes(abc.ABC, Generic[P, A]):
    """The base of a stream: who gets which piece, what became of it, and whether anybody answers."""

    def __init__(self, teacher: TeacherClient, *, name: str, threads: int = 1) -> None:
        """`teacher` has been reached once; `threads` for each of its services. The subclass calls `_start`."""
        self._teacher = teacher
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._pieces: dict[int, P] = {}
        """Unanswered, in the order of asking."""
        self._owner: dict[int, Lane] = {}
        """Of each that a service has."""
        self._unowned: deque[int] = deque()
        self._answers: dict[int, A | StillhouseError] = {}
        self._timeouts: dict[int, int] = {}
        self._failure: BaseException | None = None
        self._why_broken = ""
        self._last_answer = time.monotonic()
        self._look_again_at = 0.0
        self._closed = False
        self._lanes = [
            Lane(endpoint=each, work=threading.Condition(self._lock), is_open=each.accepted)
            for each in teacher.endpoints.all
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"{name}-{number}", daemon=True)
            for lane in self._lanes
            for number in range(threads)
        ]

    @property
    def num_asked(self) -> int:
        """Pieces sent, repetitions included."""
        with self._lock:
            return sum(lane.num_sent for lane in self._lanes)

    def take(self, piece_id: int, patience: Patience) -> A:
        """The answer to a submitted piece, waiting for it; each can be taken once.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: what a service says of this piece, with its file and row; or why there is no teacher.
        """
        while True:
            with self._lock:
                if piece_id not in self._answers and self._failure is None:
                    self._arrived.wait(POLL_S)
                answer = self._answers.pop(piece_id, None)
                failure, since, why = self._failure, self._silent_since(), self._why_broken
            if isinstance(answer, StillhouseError):
                raise answer
            if answer is not None:
                patience.clear()
                return answer
            if failure is not None:
                raise failure
            self._probe_silent()
            patience.check(since, why)

    def close(self) -> None:
        """Ends calls and threads; what is unanswered is dropped."""
        with self._lock:
            self._closed = True
            for lane in self._lanes:
                self._disown(lane)
                lane.work.notify_all()
            calls = [call for lane in self._lanes for call in lane.calls]
        for call in calls:
            call.cancel()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # What a subclass has: how to serve a lane.

    def _start(self) -> None:
        for thread in self._threads:
            thread.start()

    @abc.abstractmethod
    def _ready(self, lane: Lane) -> bool:
        """Waits until a thread of `lane` has something to do; False once the stream is closed."""

    @abc.abstractmethod
    def _serve(self, lane: Lane, stub: TeacherServiceStub) -> None:
        """One call to a service that was just checked. Raises StillhouseError or grpc.RpcError when it breaks."""

    # What a subclass uses.

    def _submit(self, piece_id: int, piece: P) -> None:
        with self._lock:
            if not self._pieces:
                self._last_answer = time.monotonic()
            self._pieces[piece_id] = piece
            self._give([piece_id])

    def _finish(self, piece_id: int, answer: A | StillhouseError) -> None:
        with self._lock:
            piece = self._pieces.pop(piece_id, None)
            lane = self._owner.pop(piece_id, None)
            if piece is None or lane is None:
                return
            self._teacher.endpoints.answered(lane.endpoint, piece.cost)
            lane.num_owed -= 1
            lane.num_answered += 1
            lane.last_answer = self._last_answer = time.monotonic()
            self._timeouts.pop(piece_id, None)
            self._answers[piece_id] = answer
            self._arrived.notify_all()

    def _refusal(self, piece_id: int, piece: P, error: StillhouseError) -> StillhouseError:
        """The error as the caller gets it; raises it if the piece is to be asked again."""
        timeouts = self._timeouts.get(piece_id, 0)
        if error.retryable and timeouts < MAX_ITEM_TIMEOUTS:
            if error.reason is Reason.ITEM_TIMEOUT:
                self._timeouts[piece_id] = timeouts + 1
            raise error
        return StillhouseError(
            error.reason,
            f"{piece.place}: {error.message}",
            metadata={**error.metadata, "place": piece.place},
        )

    # How it is done.

    def _disown(self, lane: Lane) -> list[int]:
        """What a lane owes, in the order of asking; it owes nothing any longer."""
        left = [each for each in self._pieces if self._owner.get(each) is lane]
        for piece_id in left:
            del self._owner[piece_id]
            lane.num_owed -= 1
            self._teacher.endpoints.returned(lane.endpoint, self._pieces[piece_id].cost)
        return left

    def _give(self, piece_ids: Iterable[int], *, first: bool = False) -> None:
        """To whom each goes; `first`: before what they have not sent yet."""
        lanes = [lane for lane in self._lanes if lane.is_open]
        if not lanes:
            self._unowned = deque([*piece_ids, *self._unowned] if first else [*self._unowned, *piece_ids])
            return
        endpoints = [lane.endpoint for lane in lanes]
        given: dict[int, list[int]] = {}
        for piece_id in piece_ids:
            index = self._teacher.endpoints.choose(endpoints, self._pieces[piece_id].cost)
            given.setdefault(index, []).append(piece_id)
        for index, mine in given.items():
            lane = lanes[index]
            if not lane.num_owed:
                lane.last_answer = time.monotonic()
            lane.num_owed += len(mine)
            for piece_id in mine:
                self._owner[piece_id] = lane
            if first:
                lane.queue.extendleft(reversed(mine))
            else:
                lane.queue.extend(mine)
            lane.work.notify_all()

    def _silent_since(self) -> float | None:
        """Since when nobody answers, None while somebody does."""
        silent = time.monotonic() - self._last_answer > SILENCE_S
        return self._last_answer if silent or not any(lane.is_open for lane in self._lanes) else None

    def _run(self, lane: Lane) -> None:
        """A thread of a lane: one call after the other until closed. What nobody can mend, the next `take` raises."""
        fruitless = attempt = 0
        try:
            while self._ready(lane):
                answered_before = lane.num_answered
                try:
                    stub = lane.endpoint.reach()
                    self._opened(lane)
                    try:
                        self._serve(lane, stub)
                    except grpc.RpcError as broken:
                        raise self._why(lane, broken) from broken
                except StillhouseError as error:
                    if self._closed:
                        return
                    progressed = lane.num_answered != answered_before
                    attempt = 0 if progressed else attempt + 1
                    fruitless = 0 if progressed or not is_suspicious(error) else fruitless + 1
                    passing = is_passing(error) and fruitless < MAX_FRUITLESS_BREAKS
                    self._broke(lane, error, passing=passing)
                    with self._lock:
                        pause_s = backoff_s(attempt, error) if passing else REFUSED_RETRY_S
                        lane.work.wait_for(lambda: self._closed, pause_s)
        except BaseException as error:
            log.warning("the calls to the teacher ended", error=str(error))
            with self._lock:
                self._failure = error
                self._arrived.notify_all()

    def _opened(self, lane: Lane) -> None:
        """The lane is given work, first what nobody has."""
        with self._lock:
            if lane.is_open:
                return
            lane.is_open, lane.refused, lane.hangs = True, None, False
            lane.last_answer = time.monotonic()
            log.info("a teacher's service is used", target=lane.endpoint.target)
            unowned, self._unowned = self._unowned, deque()
            self._give(unowned)

    def _broke(self, lane: Lane, error: StillhouseError, *, passing: bool) -> None:
        """The lane gets nothing more for now, and what it owes goes to others. Raises if there can be no others."""
        with self._lock:
            was_open, lane.is_open = lane.is_open, False
            if was_open:
                self._teacher.endpoints.broke(lane.endpoint)
            if error.reason is not Reason.CANCELLED:  # by another thread of the lane, which knows why
                lane.refused = None if passing else error
                self._why_broken = error.message
            lane.queue.clear()
            left = self._disown(lane)
            calls = list(lane.calls)
            self._give(left, first=True)
            others = sum(each.is_open for each in self._lanes)
            refusals = [each.refused for each in self._lanes if each.refused is not None]
        for call in calls:
            call.cancel()
        if len(refusals) == len(self._lanes):
            raise _nobody(refusals)
        if was_open or not passing:
            what = "a call to the teacher broke" if passing else "a teacher's service is refused"
            log.warning(
                what, target=lane.endpoint.target, why=error.message, asked_again=len(left), others=others
            )

    def _why(self, lane: Lane, broken: grpc.RpcError) -> StillhouseError:
        if not lane.hangs:
            return lane.endpoint.error(broken)
        return StillhouseError(
            Reason.CALL_TIMEOUT,
            f"The teacher at {lane.endpoint.target} has answered nothing for {PROBE_AFTER_S:g} s, and does not say that it is "
            f"there within {PROBE_TIMEOUT_S:g} s. It may hang: see its log.",
        )

    def _probe_silent(self) -> None:
        """Ends the calls to a service that owes an answer and does not react; one that is busy says so. Never blocks."""
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + PROBE_EVERY_S
        hanging: list[grpc.Call] = []
        with self._lock:
            for lane in self._lanes:
                late = lane.is_open and lane.num_owed and now - lane.last_answer > PROBE_AFTER_S
                if not late:
                    lane.probe = None
                elif lane.probe is None:
                    ask = lane.endpoint.stub().GetTeacherInfo
                    lane.probe = ask.future(GetTeacherInfoRequest(), timeout=PROBE_TIMEOUT_S)
                elif lane.probe.done():
                    lane.hangs = lane.probe.code() is not grpc.StatusCode.OK
                    lane.probe, lane.last_answer = None, now
                    hanging += lane.calls if lane.hangs else ()
        for call in hanging:
            call.cancel()


def _nobody(refusals: list[StillhouseError]) -> StillhouseError:
    first = refusals[0]
    if len(refusals) == 1:
        return first
    sentences = " ".join(dict.fromkeys(each.message for each in refusals))
    return StillhouseError(
        first.reason,
        f"None of the {len(refusals)} services of this teacher can be used. {sentences}",
        metadata=first.metadata,
    )
