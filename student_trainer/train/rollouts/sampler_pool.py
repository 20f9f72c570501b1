"""Rollouts on one or several services on the student's base: prompts are shared among those that answer.

A prompt's texts follow from its seed, so they are the same from every service. The services write while the training process
goes on, and begin with the next version's texts while the last ones of this version are being written; the files of the adapter
that they write with stay until they have.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait
from stillhouse.protos.rpc.pool.replica import Loss, PoolOptions
from stillhouse.protos.rpc.pool.service_pool import Call, ServicePool
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.rollouts.adapter_files import saved_adapter
from stillhouse.student_trainer.train.rollouts.local_sampler import OnText, SampledText
from stillhouse.student_trainer.train.rollouts.remote_sampler import RemoteSampler, RolloutQuery
from stillhouse.student_trainer.train.student.student import Student

log = structlog.get_logger()

OnTexts = Callable[[int, list[SampledText]], object]
"""Is told a prompt's place and its texts."""
LATE = 2.0
"""Times the longest that a service took lately for a text, after which it writes those of another one that is slower, or hangs."""
NUM_CALLS = 2
"""Calls to a service side by side: while one version's last texts are written, the next version's begin."""


class PendingTexts:
    """The texts of some prompts, which services are writing."""

    def __init__(
        self,
        pool: ServicePool[RolloutQuery, list[SampledText], RemoteSampler],
        queries: Mapping[int, RolloutQuery],
        files: ExitStack,
    ) -> None:
        """`files` are what they are written with; they go once all texts are there."""
        self._pool = pool
        self._waiting = list(queries)
        self._texts: list[list[SampledText]] = []
        self._error: StillhouseError | None = None
        self._files = files
        pool.put(queries)

    @property
    def is_done(self) -> bool:
        """True once all texts are there."""
        return not self._waiting

    def result(self, wait: BoundedWait) -> list[list[SampledText]]:
        """Up to `samples_per_prompt` texts for each prompt.

        Raises Stopped, after which it may be called again, or StillhouseError, then always.
        """
        if self._error is not None:
            raise self._error
        try:
            while self._waiting:
                self._texts.append(self._pool.get_result(self._waiting[0], wait))
                del self._waiting[0]
        except StillhouseError as error:
            self._error = error
            raise
        self._files.close()
        return self._texts

    def close(self) -> None:
        """Removes the files."""
        self._files.close()


class SamplerPool:
    """Samples with the student's adapter as it is, on all services that answer."""

    def __init__(
        self,
        student: Student,
        samplers: Sequence[RemoteSampler],
        *,
        version: Callable[[], int],
        patience: TeacherWait,
    ) -> None:
        """Reaches at least one of the services; `version` counts the student's updates.

        Raises StillhouseError: why one of them cannot be used as it is, or that none answers; Stopped.
        """
        self._student = student
        self._samplers = samplers
        self._version = version
        self._patience = patience
        self._ids = itertools.count()
        self._generation = RolloutConfig()
        """Settings of the present `write`."""
        self._fingerprint = ""
        self._begun: list[PendingTexts] = []
        self._seen_s: tuple[float, float] | None = None
        """Time of the last look at the services' loads, and the seconds that all of them had been busy."""
        self._connect()
        options: PoolOptions[RolloutQuery] = PoolOptions(
            name="rollouts",
            cost_of=lambda query: len(query.token_ids) + query.max_new_tokens,
            max_calls=NUM_CALLS,
            # A token that is replaced while the run goes on is read again before the next try.
            is_passing=lambda error, _: error.retryable or error.reason is Reason.UNAUTHENTICATED,
            late=LATE,
        )
        self._pool: ServicePool[RolloutQuery, list[SampledText], RemoteSampler] = ServicePool(
            samplers, self._serve, options, on_lost=_log_loss, on_late=_log_late
        )

    def close(self) -> None:
        """Ends the calls and closes the connections."""
        self._pool.close()
        for each in self._samplers:
            each.close()
        for pending in self._begun:
            pending.close()

    def begin(
        self,
        prompts: Sequence[NDArray[np.int32]],
        generation: RolloutConfig,
        *,
        max_sequence_tokens: int,
        seeds: Sequence[int],
        on_texts: OnTexts = lambda _prompt, _texts: None,
        on_part: OnText | None = None,
    ) -> PendingTexts:
        """Has up to `samples_per_prompt` texts of each prompt written with the student's present weights, and does not wait.

        The wait for them is that for a teacher. Prompt and text have at most `max_sequence_tokens`. `on_texts` is called once for
        each prompt, in another thread, while others are still being written, and `on_part` before, with what each text has so far,
        about every PART_TOKENS tokens. A service may be lost, and another one write the text again: by rounding it may differ.
        """
        self._generation = generation
        with ExitStack() as stack:
            adapter = stack.enter_context(saved_adapter(self._student))
            queries = {
                next(self._ids): RolloutQuery(
                    token_ids=prompt,
                    seed=seed,
                    max_new_tokens=min(generation.max_new_tokens, max_sequence_tokens - len(prompt)),
                    adapter=adapter,
                    version=self._version(),
                    on_texts=partial(on_texts, place),
                    on_part=None if on_part is None else partial(on_part, place),
                )
                for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            }
            pending = PendingTexts(self._pool, queries, stack.pop_all())
        self._begun = [*(each for each in self._begun if not each.is_done), pending]
        return pending

    def metrics(self) -> dict[str, float]:
        """The number of services, and the share of the time since the call before in which one had no text of this process to write."""
        number, now_s = len(self._samplers), time.monotonic()
        busy_s = sum(each.load.busy_s() for each in self._samplers)
        before, self._seen_s = self._seen_s, (now_s, busy_s)
        found = {"train/rollout_services": float(number)}
        if before is not None and now_s > before[0]:
            found["train/rollout_idle"] = max(0.0, 1 - (busy_s - before[1]) / (number * (now_s - before[0])))
        return found

    def _connect(self) -> None:
        while True:
            errors: list[StillhouseError] = []
            for sampler in self._samplers:
                try:
                    sampler.probe()
                    self._require_same_base(sampler)
                except StillhouseError as error:
                    if not error.retryable:
                        raise
                    errors.append(error)
            if len(errors) < len(self._samplers):
                self._patience.answered()
                return
            self._patience.pause(errors[-1])

    def _serve(self, sampler: RemoteSampler, call: Call[RolloutQuery, list[SampledText]]) -> None:
        """Makes one call for all prompts of one version that the service is given."""
        self._require_same_base(sampler)
        version: list[int] = []

        def is_same(query: RolloutQuery) -> bool:
            version[:] = version or [query.version]
            return query.version == version[0]

        queries = call.take(is_same)
        if queries:
            ids = list(queries)
            prompts = [self._while_it_counts(call, item_id, query) for item_id, query in queries.items()]
            with closing(sampler.sample(prompts, self._generation, call.on_cancel)) as written:
                for place, texts in written:
                    call.answer(ids[place], texts, first=partial(prompts[place].on_texts, texts))

    def _while_it_counts(
        self, call: Call[RolloutQuery, list[SampledText]], item_id: int, query: RolloutQuery
    ) -> RolloutQuery:
        """The query, which is told of no part any more once another service has it."""
        on_part = query.on_part
        if on_part is None:
            return query

        def tell(sample: int, text: SampledText) -> None:
            if call.item(item_id) is not None:
                on_part(sample, text)

        return replace(query, on_part=tell)

    def _require_same_base(self, sampler: RemoteSampler) -> None:
        info = sampler.info
        self._fingerprint = self._fingerprint or info.model_fingerprint
        if info.model_fingerprint != self._fingerprint:
            raise StillhouseError(
                Reason.TEACHER_CHANGED,
                f"The rollout service at {sampler.target} serves {info.model} with another model_fingerprint than the other "
                "services of this run. Start all of them on the student's base.",
            )


def _log_loss(loss: Loss) -> None:
    log.warning(
        "a rollout service is left alone", target=loss.target, why=loss.error.message, pause_s=loss.pause_s
    )


def _log_late(target: str, number: int) -> None:
    log.warning("a slow rollout service's texts are written by another one", target=target, texts=number)
