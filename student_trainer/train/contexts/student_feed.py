"""Rollouts of the student, scored by the teacher: sampled with weights whose age is bounded, counted and recorded.

A rollout that is in flight when a checkpoint is written is part of it, because its weights are gone by then; the others
are sampled after the restart with the weights and the seed that they would have had.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import StudentContextConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.batching.supports import in_rows, with_query
from stillhouse.student_trainer.train.contexts.source import Feed, FeedSettings, generated_example
from stillhouse.student_trainer.train.contexts.warm_start import WarmStart
from stillhouse.student_trainer.train.data.context_mix import Slot, text_seed
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler, SampledText
from stillhouse.student_trainer.train.rollouts.rollout_buffer import Rollout, RolloutBuffer
from stillhouse.student_trainer.train.rollouts.sampler_pool import SamplerPool
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery

log = structlog.get_logger()


class StudentFeed(Feed):
    """Rollouts of one context."""

    needs_student = True

    def __init__(
        self,
        settings: FeedSettings,
        targets: TargetStream,
        sampler: LocalSampler | SamplerPool,
        config: StudentContextConfig,
        *,
        in_flight: RolloutBuffer,
        version: Callable[[], int],
        gate: WarmStart,
        queries_top_k: bool,
        queries_parts: Callable[[], bool],
        max_staleness: int,
        teachers_per_query: int = 1,
    ) -> None:
        """`in_flight` holds the rollouts that no step has consumed yet, `version` counts the updates of the weights.

        With `queries_top_k` the teacher is queried about the student's top-k too, and while `queries_parts` about the parts of
        a text while it is written. At most `max_staleness` of the steps ahead are sampled before their turn. Each query counts for
        `teachers_per_query` teachers, whose outputs are mixed.
        """
        super().__init__(settings, [targets])
        self.ahead = min(settings.ahead, max_staleness)
        self._max_staleness = max_staleness
        self._teachers_per_query = teachers_per_query
        self._targets = targets
        self._sampler = sampler
        self._config = config
        self._in_flight = in_flight
        self._version = version
        self._gate = gate
        self._queries_top_k = queries_top_k
        self._queries_parts = queries_parts
        self._queried: defaultdict[tuple[int, int, int], _Queried] = defaultdict(_Queried)
        """Queries about each rollout, by step, slot and its place among the slot's."""
        self._next_step = 0
        """Step behind the last one whose texts are all there."""
        self._num_queries = 0
        self._num_further_queries = 0
        """Queries beyond those that count, of which each rollout has one."""
        self._submitting = threading.Lock()
        """Held while a query is sent: services' texts come in several threads."""
        self._num_dropped = 0
        self._sampling_s = 0.0

    @property
    def num_asked(self) -> int:
        return super().num_asked - self._teachers_per_query * self._num_further_queries

    def request(self, step: int, slots: Sequence[Slot]) -> None:
        """Samples the rollouts, unless a checkpoint had them, and queries the targets of each as soon as it is there.

        Services write those of later steps while this process goes on.
        """
        key, version = (self._settings.context, step), self._version()

        def send(place: int, sample: int, text: SampledText) -> None:
            self._submit(step, sample, self._rollout(slots[place], text, version), slots[place].row)

        def send_part(place: int, sample: int, text: SampledText) -> None:
            rollout = self._rollout(slots[place], text, version)
            self._submit(step, sample, rollout, slots[place].row, is_part=True)

        # The teacher scores texts, and what is there of the others, while these are still being written.
        on_part = send_part if self._queries_parts() else None

        def send_all(place: int, texts: Sequence[SampledText]) -> None:
            for sample, text in enumerate(texts):
                send(place, sample, text)

        if key in self._in_flight.rollouts:
            row_of = {slot.position: slot.row for slot in slots}
            for sample, rollout in _numbered(self._in_flight.rollouts[key]):
                self._submit(step, sample, rollout, row_of.get(rollout.slot))
        elif not slots:
            self._in_flight.rollouts[key] = []
        elif isinstance(self._sampler, SamplerPool):
            # The version stands beside the weights in memory and in a checkpoint: they cannot disagree.
            texts = self._sampler.begin(**self._order(slots), on_texts=send_all, on_part=on_part)
            self._in_flight.pending[key] = lambda wait: self._rollouts(slots, texts.result(wait), version)
        else:
            began = time.monotonic()
            written = self._sampler.write(**self._order(slots), on_text=send, on_part=on_part)
            self._in_flight.rollouts[key] = self._rollouts(slots, written, version)
            self._sampling_s = time.monotonic() - began

    def _submit(
        self, step: int, sample: int, rollout: Rollout, row: int | None, *, is_part: bool = False
    ) -> None:
        """Queries the targets of one rollout, or of what there is of it, of which earlier calls may have had the beginning.

        It is of the training row `row`, from which what teachers alone see comes, and stands at `sample` among those of its slot.
        """
        with self._submitting:
            queried = self._queried[step, rollout.slot, sample]
            if is_part and (queried.is_whole or step < self._next_step):
                return  # from a service whose place another one has taken
            before, queried.is_whole = queried.rollout, not is_part
            if before is not None and not _begins(rollout, before):
                if is_part and _begins(before, rollout):
                    return
                # Another service writes the text again, and rounding has parted the two.
                queried.void += queried.parts
                queried.parts = []
            queried.rollout = rollout
            self._submit_rest(queried.parts, rollout, row)

    def _submit_rest(self, parts: list[_Part], rollout: Rollout, row: int | None) -> None:
        """Queries the targets of a rollout behind `parts`."""
        num_scored = parts[-1].end if parts else 0
        start = num_scored or rollout.start
        if start == len(rollout.token_ids):
            return
        query = TeacherQuery(
            token_ids=rollout.token_ids,
            start=start,
            place=rollout.place,
            teacher=rollout.teacher,
            teacher_prompts={} if row is None else self._settings.examples[row].teacher_prompts,
            query_token_ids=_queried(rollout, start - rollout.start) if self._queries_top_k else None,
            num_scored=num_scored,
        )
        parts.append(_Part(query_id=self._num_queries, end=len(rollout.token_ids)))
        self._num_queries += 1
        self._targets.submit(parts[-1].query_id, query)

    def _answer(self, step: int, sample: int, rollout: Rollout) -> Distributions | None:
        """Waits for the targets of a rollout; None if some are non-finite."""
        with self._submitting:
            queried = self._queried.pop((step, rollout.slot, sample))
        self._forget(queried.void)
        found = self._receive_all(self._targets.get_result, [each.query_id for each in queried.parts])
        # Rollouts count once, however many parts they have.
        self._num_further_queries += len(queried.parts) - 1
        if found is None:
            return None
        num_draws = 0 if rollout.draws is None else rollout.draws.shape[1]
        return _joined(found, num_queries=rollout.likeliest.shape[1] + num_draws)

    def _forget(self, parts: Sequence[_Part]) -> None:
        """Takes in answers that nothing needs."""
        self._num_further_queries += len(parts)
        for each in parts:
            with contextlib.suppress(StillhouseError):
                self._targets.get_result(each.query_id, self._settings.patience)

    def _forget_others(self) -> None:
        """Forgets parts of texts that became no rollouts of the steps so far."""
        with self._submitting:
            keys = [key for key in self._queried if key[0] < self._next_step]
            others = [self._queried.pop(key) for key in keys]
        for each in others:
            self._forget([*each.void, *each.parts])

    def collect(self, step: int) -> Iterator[ScoredExample]:
        """The rollouts with their targets; those that are too old are dropped and counted."""
        began = time.monotonic()
        self._in_flight.finish((self._settings.context, step), self._settings.patience)
        self._next_step = step + 1
        if isinstance(self._sampler, SamplerPool):
            self._sampling_s = time.monotonic() - began
        version = self._version()
        # They stay until the step is taken: a run that stops before that resumes with them.
        rollouts = self._in_flight.rollouts[self._settings.context, step]
        means, seen = _Means(), 0
        for sample, rollout in _numbered(rollouts):
            answer = self._answer(step, sample, rollout)
            if answer is None:
                self._num_dropped += 1
                continue
            age = version - rollout.version
            means.add({"train/rollout_staleness": age})
            if age > self._max_staleness:
                self._num_dropped += 1
                continue
            seen += 1
            num_tokens = len(rollout.token_ids) - rollout.start
            means.add({"train/rollout_tokens": num_tokens, "train/rollout_finished": float(rollout.finished)})
            if self._queries_top_k:
                means.add(_overlap(answer, rollout))
                answer, clamped = with_query(answer, rollout.likeliest, rollout.token_ids, rollout.draws)
                means.add({"train/rollout_tail_clamped": clamped})
            self._gate.see(answer.target_logprobs)
            yield ScoredExample(
                example=generated_example(rollout.token_ids, rollout.start, rollout.place, rollout.teacher),
                answer=answer,
                context=self._settings.context,
                behaviour_logprobs=rollout.behaviour_logprobs,
                draw_logprobs=rollout.draw_logprobs,
                group=rollout.slot,
            )
        self._forget_others()
        self._gate.check(step)
        self.metrics: dict[str, float] = means.means() | {
            # Over all steps of this process: too old, without targets, or with tokens unknown to the teacher.
            "train/rollouts_dropped": float(self._num_dropped),
            "train/rollout_time_s": self._sampling_s,
        }
        if isinstance(self._sampler, SamplerPool):
            self.metrics |= self._sampler.metrics()
        if len(rollouts) > seen:
            log.warning("rollouts left out", step=step + 1, left_out=len(rollouts) - seen, of=len(rollouts))

    def _order(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """Arguments of a sampler."""
        return {
            "prompts": [self._settings.examples[slot.row].prompt for slot in slots],
            "generation": self._config.generation,
            "max_sequence_tokens": self._settings.max_sequence_tokens,
            "seeds": [
                text_seed(self._settings.seed, self._settings.context, slot.position) for slot in slots
            ],
        }

    def _rollouts(
        self, slots: Sequence[Slot], texts: Sequence[Sequence[SampledText]], version: int
    ) -> list[Rollout]:
        wanted = len(slots) * self._config.generation.samples_per_prompt
        self._num_dropped += wanted - sum(map(len, texts))
        return [
            self._rollout(slot, text, version)
            for slot, several in zip(slots, texts, strict=True)
            for text in several
        ]

    def _rollout(self, slot: Slot, text: SampledText, version: int) -> Rollout:
        """A rollout, cut to the room that its teachers leave."""
        example = self._settings.examples[slot.row]
        text = text.first(self._settings.room(example))
        return Rollout(
            token_ids=np.concatenate([example.prompt, text.token_ids]),
            start=len(example.prompt),
            behaviour_logprobs=text.logprobs,
            likeliest=text.likeliest,
            draws=text.draws if text.draws.shape[1] else None,
            draw_logprobs=text.draw_logprobs if text.draws.shape[1] else None,
            finished=text.finished,
            version=version,
            place=example.place,
            teacher=example.teacher,
            slot=slot.position,
        )


class _Part(NamedTuple):
    """A query about some of a rollout's positions, up to `end`."""

    query_id: int
    end: int


@dataclass(slots=True)
class _Queried:
    """Queries about one rollout."""

    rollout: Rollout | None = None
    """The rollout, or what there is of it."""
    is_whole: bool = False
    parts: list[_Part] = field(default_factory=list)
    """In the order of their positions."""
    void: list[_Part] = field(default_factory=list)
    """Those about a text that was written again."""


def _numbered(rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Rollout]]:
    """Rollouts with their places among those of their slots, which stand together."""
    for _, several in itertools.groupby(rollouts, lambda each: each.slot):
        yield from enumerate(several)


class _Means:
    """Means by name."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] += value
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def _begins(rollout: Rollout, part: Rollout) -> bool:
    """True if a rollout begins with what there was of it before."""
    if len(rollout.token_ids) < len(part.token_ids):
        return False
    count = len(part.token_ids) - part.start
    return (
        np.array_equal(rollout.token_ids[: len(part.token_ids)], part.token_ids)
        and np.array_equal(rollout.likeliest[:count], part.likeliest)
        and _same_draws(rollout.draws, part.draws, count)
    )


def _same_draws(draws: NDArray[np.int32] | None, before: NDArray[np.int32] | None, count: int) -> bool:
    """True if the first `count` positions have the draws `before`, whatever the number of empty columns."""
    empty = np.empty((count, 0), np.int32)
    now, before = (empty if each is None else each[:count] for each in (draws, before))
    width = min(now.shape[1], before.shape[1])
    return np.array_equal(now[:, :width], before[:, :width]) and not any(
        (each[:, width:] >= 0).any() for each in (now, before)
    )


def _queried(rollout: Rollout, first: int) -> NDArray[np.int32]:
    """[n, Q + R]: the student's top-k and draws from the position `first` of the completion on, without columns that none has."""
    likeliest = rollout.likeliest[first:]
    if rollout.draws is None:
        return likeliest
    draws = rollout.draws[first:]
    used = np.flatnonzero((draws >= 0).any(axis=0))
    return np.concatenate([likeliest, draws[:, : int(used.max(initial=-1)) + 1]], axis=1)


def _joined(answers: Sequence[Distributions], *, num_queries: int) -> Distributions:
    """The answers about the parts of a rollout as one, with as many queried columns as the rollout has."""

    def widened(answer: Distributions) -> Distributions:
        queried = answer.query_logprobs
        if queried is None or queried.shape[1] == num_queries:
            return answer
        room = ((0, 0), (0, num_queries - queried.shape[1]))
        return replace(answer, query_logprobs=np.pad(queried, room, constant_values=-np.inf))

    return Distributions.concat([widened(each) for each in answers])


def _overlap(answer: Distributions, rollout: Rollout) -> dict[str, float]:
    """Overlap of the two top-k sets, and the teacher's mass on the student's, as means over positions."""
    width = min(answer.token_ids.shape[1], rollout.likeliest.shape[1])
    ours, theirs = rollout.likeliest[:, :width], answer.token_ids[:, :width]
    assert answer.query_logprobs is not None
    known = answer.query_logprobs[:, : rollout.likeliest.shape[1]]
    return {
        "train/rollout_overlap": float(in_rows(ours, theirs).mean()),
        "train/rollout_teacher_mass": float(np.exp(known).sum(-1).mean()),
    }
