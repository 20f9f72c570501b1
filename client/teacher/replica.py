"""A teacher service as the replica of a pool: verified again after it was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from stillhouse.client.core.connection import OnLost
from stillhouse.client.teacher.connection import TeacherConnection
from stillhouse.protos.rpc.pool.load_balancing import Load
from stillhouse.protos.rpc.pool.replica import Loss


class TeacherReplica:
    """One service of a teacher."""

    def __init__(
        self, teacher: TeacherConnection, verify: Callable[[TeacherConnection], None] = lambda _: None
    ) -> None:
        """`verify` runs before a lost service is used again, and raises if it is another teacher."""
        self.teacher = teacher
        self.target = teacher.target
        self.load = Load()
        self.is_ready = teacher.was_reached
        """False from its loss until it is verified."""
        self._verify = verify

    def probe(self) -> None:
        """Verifies a service that was lost."""
        if not self.is_ready:
            self._verify(self.teacher)
            self.is_ready = True

    def ping(self) -> None:
        """Returns at once: the channel's keepalive finds hosts that are gone."""

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raises a broken call of the block as StillhouseError; the service is verified before the next one."""
        try:
            yield
        except grpc.RpcError as error:
            self.is_ready = False
            raise self.teacher.error(error) from error


def tell(on_lost: OnLost | None) -> Callable[[Loss], None]:
    """Returns a pool's listener for a caller's."""
    return lambda loss: on_lost(loss.error, loss.pause_s) if on_lost is not None else None
