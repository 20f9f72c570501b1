"""The services of one teacher: each is checked before it is asked anything and after every break, and all of them share the work."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc
import structlog

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.rpc.load_balancing import Load, lightest
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoRequest, GetTeacherInfoResponse
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.student_trainer.config.schema import TeacherConfig
from stillhouse.student_trainer.train.teacher import credentials

log = structlog.get_logger()

INFO_TIMEOUT_S = 5.0
"""Deadline of one GetTeacherInfo."""
MAX_BACKOFF_S = 20.0

# What a broken connection or a restarting service looks like; anything else will not go away by asking again.
_PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNAUTHENTICATED,  # a token is replaced while the run goes on, and read again
    }
)
_SUSPICIOUS = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})

Check = Callable[["Endpoint", TeacherServiceStub, GetTeacherInfoResponse], None]
"""Raises StillhouseError if a service that answered is not the run's teacher, or grpc.RpcError if it is gone again."""


def is_passing(error: StillhouseError) -> bool:
    """Whether a service that was accepted before may answer again after such an error."""
    return error.code in _PASSING and error.reason is not Reason.MESSAGE_TOO_LARGE


def is_suspicious(error: StillhouseError) -> bool:
    """Whether an error that may pass is also what a bug looks like, which does not."""
    return error.code in _SUSPICIOUS


def backoff_s(attempt: int, error: StillhouseError | None = None) -> float:
    """Seconds to wait before try number `attempt` + 2: what the service asks for, else exponential with full jitter."""
    if error is not None and error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0.05, min(MAX_BACKOFF_S, 0.25 * 2.0 ** min(attempt, 10)))  # noqa: S311 - no secret


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What became of the work that was given to some services."""

    answered: int = 0
    """Sequences and prompts."""
    outstanding: int = 0
    """Of these, unanswered at present."""
    outstanding_tokens: int = 0
    returned: int = 0
    """Taken away unanswered, to be asked again."""
    breaks: int = 0
    """Streams and calls that broke."""


class Endpoint:
    """One service, used from several threads."""

    def __init__(self, target: str, config: TeacherConfig, check: Check) -> None:
        self.target = target
        self.accepted = False
        """Whether it was found to be the run's teacher when it was asked last."""
        self.load = Load()
        """Guarded by the lock of `Endpoints`."""
        self.num_breaks = 0
        self._config = config
        self._check = check
        self._lock = threading.Lock()
        self._channels: list[grpc.Channel] = []
        self._signature: credentials.Signature | None = None

    def reach(self) -> TeacherServiceStub:
        """The service, checked. Raises StillhouseError: what it says, what its check says, or that nobody answers."""
        try:
            stub = self.stub()
            info = stub.GetTeacherInfo(GetTeacherInfoRequest(), timeout=INFO_TIMEOUT_S)
            self._check(self, stub, info)
        except grpc.RpcError as error:
            self.accepted = False
            raise self.error(error) from error
        except StillhouseError:
            self.accepted = False
            raise
        self.accepted = True
        return stub

    def stub(self) -> TeacherServiceStub:
        """The service, unchecked; over another channel once a token or certificate was replaced."""
        with self._lock:
            try:
                found = credentials.signature(self._config, self.target)
                if found != self._signature:
                    self._channels.append(connect(found[0]))
                    if self._signature is not None:
                        log.info("credential read again", target=self.target)
                    self._signature = found
            except StillhouseError as error:
                if not self._channels:
                    raise
                log.warning("the former credential is used", why=error.message)
            return TeacherServiceStub(self._channels[-1])

    def error(self, error: grpc.RpcError) -> StillhouseError:
        """What went wrong, as a sentence with a remedy."""
        said = from_rpc_error(error, target=self.target, service="teacher")
        if said.reason is not Reason.UNAUTHENTICATED:
            return said
        return StillhouseError(
            said.reason,
            f"The teacher at {self.target} refuses this run's credential ({said.message}) Put a valid token into the "
            "token_file that the trainer's credentials.toml names for this teacher: it is read again before every try.",
            metadata=said.metadata,
        )

    def close(self) -> None:
        """Closes its channels, and with them all calls."""
        with self._lock:
            for channel in self._channels:
                channel.close()
            self._channels.clear()
            self._signature = None


class Endpoints:
    """All services of a teacher, and who of them has how much to do."""

    def __init__(self, config: TeacherConfig, check: Check) -> None:
        self.all = tuple(Endpoint(target, config, check) for target in dict.fromkeys(config.targets))
        """In the order of the run file."""
        self._lock = threading.Lock()

    def choose(self, among: Sequence[Endpoint], cost: int) -> int:
        """Index of the one that gets a piece of work of `cost` tokens; it is counted there."""
        with self._lock:
            index = lightest([each.load for each in among], cost)
            among[index].load.give(cost)
            return index

    def answered(self, endpoint: Endpoint, cost: int) -> None:
        """A piece of work is done."""
        with self._lock:
            endpoint.load.answer(cost)

    def returned(self, endpoint: Endpoint, cost: int) -> None:
        """A piece of work is taken away from a service."""
        with self._lock:
            endpoint.load.take_back(cost)

    def broke(self, endpoint: Endpoint) -> None:
        """A stream or a call to a service broke."""
        with self._lock:
            endpoint.num_breaks += 1

    def counts(self) -> Mapping[str, Counts]:
        """By target."""
        with self._lock:
            return {
                each.target: Counts(
                    answered=each.load.num_answered,
                    outstanding=each.load.num_outstanding,
                    outstanding_tokens=each.load.outstanding,
                    returned=each.load.num_returned,
                    breaks=each.num_breaks,
                )
                for each in self.all
            }

    def close(self) -> None:
        """Closes all channels."""
        for each in self.all:
            each.close()
