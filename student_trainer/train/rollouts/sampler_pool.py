"""Texts of the student from several services on its base: each prompt goes to the one that will be done first, and what one leaves goes to the others.

A prompt's texts follow from its seed, so that it does not matter who writes them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.load_balancing import Load, lightest
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.rollouts.local_sampler import Text
from stillhouse.student_trainer.train.rollouts.remote_sampler import RemoteSampler
from stillhouse.student_trainer.train.teacher.endpoints import backoff_s

log = structlog.get_logger()

REFUSED_RETRY_S = 20.0
"""A service that cannot be used as it is is looked at again after so long."""


class _Once(Patience):
    """The patience of one try: what would have to be waited for is raised."""

    def __init__(self) -> None:
        """It reports nothing."""

    def sleep(self, duration_s: float, waiting_since: float | None, why: str = "") -> None:  # noqa: ARG002
        raise StillhouseError(Reason.TEACHER_UNREACHABLE, why, retry_after_s=duration_s)

    def clear(self) -> None:
        """Nothing was reported."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Member:
    target: str
    sampler: RemoteSampler | None = None
    """None: it was never reached."""
    load: Load = field(default_factory=Load)
    not_before_s: float = 0.0
    attempt: int = 0
    refused: StillhouseError | None = None


class SharedSampler:
    """Writes texts with the student's adapter as it is, through all services that answer."""

    def __init__(
        self,
        targets: Sequence[str],
        reach: Callable[[str, Patience], RemoteSampler],
        patience: Patience,
    ) -> None:
        """Reaches at least one of the services at `targets`.

        Raises StillhouseError: why one of them cannot be used as it is, or that nobody answers; Stopped.
        """
        self._members = [_Member(target=each) for each in targets]
        self._lock = threading.Lock()
        self._reach = reach
        self._patience = patience
        since, attempt = time.monotonic(), 0
        while True:
            for member in self._members:
                self._try(member, partial(self._sampler, member))
            refused = [each.refused for each in self._members if each.refused is not None]
            if refused:
                raise refused[0]
            if any(each.sampler for each in self._members):
                self._patience.clear()
                return
            self._patience.sleep(backoff_s(attempt), since, "No rollout service answers.")
            attempt += 1

    def close(self) -> None:
        """Closes the connections."""
        for member in self._members:
            if member.sampler is not None:
                member.sampler.close()

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        generation: RolloutConfig,
        *,
        max_sequence_tokens: int,
        seeds: Sequence[int],
    ) -> list[list[Text]]:
        """Up to `samples_per_prompt` texts for each prompt, waiting for the services as for a teacher.

        Raises Stopped, or StillhouseError.
        """
        texts: dict[int, list[Text]] = {}
        costs = [len(each) + generation.max_new_tokens * generation.samples_per_prompt for each in prompts]

        def write_part(member: _Member, part: Sequence[int]) -> None:
            try:
                written = self._sampler(member).write(
                    [prompts[each] for each in part],
                    generation,
                    max_sequence_tokens=max_sequence_tokens,
                    seeds=[seeds[each] for each in part],
                )
                texts.update(zip(part, written, strict=True))
            finally:
                with self._lock:
                    for each in part:
                        (member.load.answer if each in texts else member.load.take_back)(costs[each])

        since, attempt = time.monotonic(), 0
        with ThreadPoolExecutor(len(self._members), thread_name_prefix="rollouts") as pool:
            while len(texts) < len(prompts):
                shares = self._shares([each for each in range(len(prompts)) if each not in texts], costs)
                jobs = [
                    pool.submit(self._try, member, partial(write_part, member, part))
                    for member, part in shares.items()
                ]
                errors = [error for job in jobs if (error := job.result()) is not None]
                self._refuse_if_all_are_wrong()
                if len(errors) < len(jobs):
                    since, attempt = time.monotonic(), 0
                else:
                    why = errors[-1].message if errors else "No rollout service answers."
                    self._patience.sleep(backoff_s(attempt), since, why)
                    attempt += 1
        self._patience.clear()
        return [texts[each] for each in range(len(prompts))]

    def _shares(self, left: Sequence[int], costs: Sequence[int]) -> Mapping[_Member, list[int]]:
        """Who writes to which prompts; nobody if all are left alone at the moment."""
        now = time.monotonic()
        members = [each for each in self._members if now >= each.not_before_s]
        shares: dict[_Member, list[int]] = {}
        with self._lock:
            for each in left if members else ():
                member = members[lightest([other.load for other in members], costs[each])]
                member.load.give(costs[each])
                shares.setdefault(member, []).append(each)
        return shares

    def _try(self, member: _Member, work: Callable[[], object]) -> StillhouseError | None:
        """Why `work` was not done; then the service is left alone for a while."""
        try:
            work()
        except StillhouseError as error:
            passes = error.retryable
            pause_s = backoff_s(member.attempt, error) if passes else REFUSED_RETRY_S
            member.attempt += 1
            member.refused = None if passes else error
            member.not_before_s = time.monotonic() + pause_s
            log.warning(
                "a rollout service is left alone", target=member.target, why=error.message, pause_s=pause_s
            )
            return error
        member.attempt, member.refused = 0, None
        return None

    def _sampler(self, member: _Member) -> RemoteSampler:
        """The connection to a service, which is checked when it is made."""
        if member.sampler is None:
            sampler = self._reach(member.target, _Once())
            known = next((each.sampler for each in self._members if each.sampler is not None), sampler)
            if sampler.info.model_fingerprint != known.info.model_fingerprint:
                sampler.close()
                raise StillhouseError(
                    Reason.TEACHER_CHANGED,
                    f"The rollout service at {member.target} serves {sampler.info.model}, and another one of this run "
                    f"{known.info.model} with another model_fingerprint. Start all of them on the student's base.",
                )
            member.sampler = sampler
        return member.sampler

    def _refuse_if_all_are_wrong(self) -> None:
        refused = [each.refused for each in self._members if each.refused is not None]
        if len(refused) == len(self._members):
            raise refused[0]
