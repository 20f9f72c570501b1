"""The services that write one batch: each is the same teacher, the one that will be done first gets the next call, and one that is lost is left alone for a while.

Used from the caller's thread alone.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stillhouse.client.batch.teacher_identity import identity
from stillhouse.client.core.connection import FIRST_PAUSE_S, LONGEST_PAUSE_S, OnLost
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.load_balancing import Load, lightest

if TYPE_CHECKING:
    from stillhouse.client.teacher.teacher import Teacher

MAX_CALLS = 24
"""Calls at once to one service."""


class Check:
    """Whether a service that was lost is back, and the same teacher; on a thread, so that the others go on meanwhile."""

    def __init__(self, verify: Callable[[Teacher], None], teacher: Teacher) -> None:
        self.error: Exception | None = None
        self._verify, self._teacher = verify, teacher
        self._thread = threading.Thread(target=self._run, name="batch-check", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether the answer is there."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until the answer is there."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._verify(self._teacher)
        except Exception as error:  # whatever it is, it is raised where the check is read
            self.error = error


@dataclass(eq=False, kw_only=True, slots=True)
class Member:
    """One service of the pool."""

    teacher: Teacher
    load: Load = field(default_factory=Load)
    """In samples."""
    num_calls: int = 0
    pause_s: float = FIRST_PAUSE_S
    not_before_s: float = 0.0
    """Nothing is asked of it until then."""
    lost_since_s: float | None = None
    """Since when it has answered nothing; None while all is well."""
    check: Check | None = None
    is_checked: bool = False
    """Whether it was found to be the same teacher since it was lost."""

    def answered(self) -> None:
        """It wrote something."""
        self.lost_since_s = None
        self.pause_s = FIRST_PAUSE_S


class Pool:
    """Chooses among the services."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        verify: Callable[[Teacher], None],
        on_lost: OnLost | None,
        patience_s: float,
    ) -> None:
        """`verify` is called before a service that was lost is asked again: it raises if that is another teacher."""
        now = time.monotonic()
        self._members = [
            Member(teacher=each, lost_since_s=None if each.was_reached else now) for each in teachers
        ]
        self._verify = verify
        self._on_lost = on_lost
        self._patience_s = patience_s

    def choose(self, num_samples: int, max_inflight: int) -> Member | None:
        """Who gets the next call, of about so many samples; None if all have enough to do or are left alone."""
        now = time.monotonic()
        members = [
            each
            for each in self._members
            if now >= each.not_before_s
            and each.num_calls < MAX_CALLS
            and each.load.num_outstanding <= max_inflight - num_samples
            and (each.check is None or each.check.is_done)
        ]
        if not members:
            return None
        return members[lightest([each.load for each in members], num_samples)]

    def is_reachable(self, member: Member) -> bool:
        """Whether a service may be asked; after a loss it is looked at first."""
        if member.lost_since_s is None or member.is_checked:
            return True
        if member.check is None:
            member.check = Check(self._verify, member.teacher)
        if not self._others(member):
            member.check.wait()
        if not member.check.is_done:
            return False
        error, member.check = member.check.error, None
        if error is None:
            member.is_checked = True
            return True
        if not isinstance(error, StillhouseError) or not (error.retryable or self._others(member)):
            raise error
        self.lost(member, error)
        return False

    def lost(self, member: Member, error: StillhouseError) -> None:
        """Leaves a service alone for a while. Raises `error` if nobody has answered for too long."""
        now = time.monotonic()
        if now < member.not_before_s:
            return  # other calls broke off for the same reason
        member.lost_since_s = now if member.lost_since_s is None else member.lost_since_s
        member.is_checked = False
        lost_since = [each.lost_since_s for each in self._members if each.lost_since_s is not None]
        if len(lost_since) == len(self._members) and now - max(lost_since) > self._patience_s:
            raise error
        pause_s = max(member.pause_s, min(error.retry_after_s or 0.0, LONGEST_PAUSE_S))
        pause_s *= random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        member.pause_s = min(2 * member.pause_s, LONGEST_PAUSE_S)
        member.not_before_s = now + pause_s
        if self._on_lost is not None:
            self._on_lost(error, pause_s)

    def pause_s(self) -> float:
        """Time until the first of those that are left alone is looked at again; 0 if none is."""
        now = time.monotonic()
        return min(
            (each.not_before_s - now for each in self._members if each.not_before_s > now), default=0.0
        )

    def _others(self, member: Member) -> bool:
        return any(each is not member and each.lost_since_s is None for each in self._members)


def agreeing(teachers: Sequence[Teacher]) -> list[Teacher]:
    """The services that answer, which are the same teacher, and behind them those that do not answer.

    Raises StillhouseError: why none answers; TEACHER_CHANGED if two would write other text.
    """
    answering: list[Teacher] = []
    silent: list[Teacher] = []
    errors: list[StillhouseError] = []
    for each in teachers:
        try:
            each.refresh()
        except StillhouseError as error:
            if not error.retryable or len(teachers) == 1:
                raise
            errors.append(error)
            silent.append(each)
        else:
            answering.append(each)
    if not answering:
        raise errors[0]
    first = identity(answering[0].limits)
    for each in answering[1:]:
        found = identity(each.limits)
        other = [name for name in first if name != "model" and first[name] != found[name]]
        if other:
            raise StillhouseError(
                Reason.TEACHER_CHANGED,
                f"{each.target} serves {found['model']} with another {other[0]} than {first['model']} at "
                f"{answering[0].target}. A batch is written by one teacher: leave one of the two out.",
            )
    return answering + silent
