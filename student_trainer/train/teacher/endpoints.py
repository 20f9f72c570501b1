"""A teacher's services: each is checked before every call, over a channel that follows its credential."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import structlog

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.rpc.pool.load_balancing import Load
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoRequest, GetTeacherInfoResponse
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.teacher import credentials

log = structlog.get_logger()

INFO_TIMEOUT_S = 5.0
"""Deadline of one GetTeacherInfo."""
PING_TIMEOUT_S = 10.0
"""Time in which a silent service has to say that it is there."""

# Codes of a broken connection or a restarting service; anything else stays when asked again.
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
    """Returns whether a service that was accepted before may answer again after such an error."""
    return error.code in _PASSING and error.reason is not Reason.MESSAGE_TOO_LARGE


def is_suspicious(error: StillhouseError) -> bool:
    """Returns whether an error that may pass also looks like a bug, which stays."""
    return error.code in _SUSPICIOUS


class Endpoint:
    """One service: a pool's replica, used from several threads."""

    def __init__(
        self, target: str, config: TeacherConfig, check: Check, *, field: str = "teachers[0].credential"
    ) -> None:
        """`field` is the credential's place in the run file, named in errors."""
        self.target = target
        self.is_ready = False
        """True if the last probe found it to be the run's teacher."""
        self.load = Load()
        self._config = config
        self._check = check
        self._field = field
        self._lock = threading.Lock()
        self._channels: list[grpc.Channel] = []
        self._signature: credentials.Signature | None = None

    def probe(self) -> None:
        """Checks that the run's teacher answers here.

        Raises StillhouseError: the service's, its check's, or that nobody answers.
        """
        try:
            with self.errors():
                stub = self.stub()
                info = stub.GetTeacherInfo(GetTeacherInfoRequest(), timeout=INFO_TIMEOUT_S)
                self._check(self, stub, info)
        except StillhouseError:
            self.is_ready = False
            raise
        if not self.is_ready:
            self.is_ready = True
            log.info("a service is used", target=self.target)

    def ping(self) -> None:
        """Returns if the service answers at all; raises StillhouseError."""
        with self.errors():
            self.stub().GetTeacherInfo(GetTeacherInfoRequest(), timeout=PING_TIMEOUT_S)

    def stub(self) -> TeacherServiceStub:
        """Returns the service, unchecked; over another channel once a token or certificate was replaced."""
        with self._lock:
            try:
                found = credentials.signature(self._config, self.target, field=self._field)
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

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raises a broken call of the block as StillhouseError, with a remedy."""
        try:
            yield
        except grpc.RpcError as error:
            said = from_rpc_error(error, target=self.target, service="teacher")
            if said.reason is not Reason.UNAUTHENTICATED:
                raise said from error
            raise StillhouseError(
                said.reason,
                f"The teacher at {self.target} refuses this run's credential ({said.message}) Put a valid token into the "
                "token_file that the trainer's credentials.toml names for this teacher: it is read again before every try.",
                metadata=said.metadata,
            ) from error

    def close(self) -> None:
        """Closes its channels, and with them all calls."""
        with self._lock:
            for channel in self._channels:
                channel.close()
            self._channels.clear()
            self._signature = None
