"""The student's own texts, scored by the teacher: written with weights whose age is bounded, counted and recorded.

A rollout that is in flight when a checkpoint is written is part of it, because its weights are gone by then; what was
not begun is written after the restart with the weights and the seed that it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import RolloutConfig, StudentContextConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.batching.supports import with_query
from stillhouse.student_trainer.train.contexts.source import Skips
from stillhouse.student_trainer.train.contexts.warm_start import WarmStart
from stillhouse.student_trainer.train.data.context_mix import Slot, text_seed
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.rollouts.local_sampler import Text
from stillhouse.student_trainer.train.rollouts.rollout_buffer import InFlight, Rollout
from stillhouse.student_trainer.train.teacher.answers import Answers

log = structlog.get_logger()


class TextWriter(Protocol):
    """Writes texts with the student's weights as they are: rollouts.Sampler here, remote_rollouts.RemoteSampler elsewhere."""

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        generation: RolloutConfig,
        *,
        max_sequence_tokens: int,
        seeds: Sequence[int],
    ) -> list[list[Text]]:
        """Texts for each prompt, drawn by its seed, of at most `max_sequence_tokens` with it."""
        ...


class StudentFeed:
    """Rollouts of one context."""

    def __init__(
        self,
        examples: Sequence[Example],
        answers: Answers,
        sampler: TextWriter,
        config: StudentContextConfig,
        in_flight: InFlight,
        *,
        context: int,
        seed: int,
        asks_query: bool,
        ahead: int,
        max_sequence_tokens: int,
        gate: WarmStart,
        version: Callable[[], int],
        patience: Patience,
    ) -> None:
        """`ahead`: steps whose rollouts are written before their turn, at most `max_staleness`.

        `asks_query`: the teacher is asked for the student's likeliest tokens too. `version` gives the updates that
        the weights have had.
        """
        self.ahead = min(ahead, config.max_staleness)
        self._examples = examples
        self._answers = answers
        self._sampler = sampler
        self._config = config
        self._in_flight = in_flight
        self._context = context
        self._seed = seed
        self._asks_query = asks_query
        self._max_sequence_tokens = max_sequence_tokens
        self._gate = gate
        self._version = version
        self._patience = patience
        self._skips = Skips()
        self._num_dropped = 0
        self._writing_s = 0.0
        self._metrics: dict[str, float] = {}

    @property
    def num_asked(self) -> int:
        """Texts that teachers were asked for."""
        return self._answers.num_asked

    def ask(self, step: int, slots: Sequence[Slot]) -> None:
        """Writes the texts, unless they came out of a checkpoint, and asks for their answers."""
        key = (self._context, step)
        if key not in self._in_flight.rollouts:
            self._in_flight.rollouts[key] = self._write(slots) if slots else []
        for number, rollout in enumerate(self._in_flight.rollouts[key]):
            self._answers.submit(
                self._id(step, number),
                rollout.token_ids,
                rollout.start,
                rollout.place,
                teacher=rollout.teacher,
                query_token_ids=rollout.likeliest if self._asks_query else None,
            )

    def take(self, step: int) -> Iterator[ScoredExample]:
        """The texts with their answers; those that are too old are left out and counted."""
        version = self._version()
        # They stay until the step is taken: a run that stops before that goes on with them.
        rollouts = self._in_flight.rollouts[self._context, step]
        log_sums, seen = _Sums(), 0
        for number, rollout in enumerate(rollouts):
            try:
                answer = self._answers.take(self._id(step, number), self._patience)
            except StillhouseError as error:
                self._skips.count(error, self.num_asked)
                self._num_dropped += 1
                continue
            age = version - rollout.version
            log_sums.add("rollout_staleness", age)
            if age > self._config.max_staleness:
                self._num_dropped += 1
                continue
            seen += 1
            log_sums.add("rollout_tokens", len(rollout.token_ids) - rollout.start)
            log_sums.add("rollout_finished", float(rollout.finished))
            if self._asks_query:
                log_sums.add_all(_overlap(answer, rollout))
                answer, clamped = with_query(answer, rollout.likeliest, rollout.token_ids)
                log_sums.add("rollout_tail_clamped", clamped)
            self._gate.see(answer.target_logprobs)
            yield _scored(rollout, answer, self._context)
        self._gate.check(step)
        self._metrics = {f"train/{name}": value for name, value in log_sums.means().items()}
        self._metrics["train/rollouts_dropped"] = float(self._num_dropped)
        self._metrics["train/rollout_time_s"] = self._writing_s
        if len(rollouts) > seen:
            log.warning("rollouts left out", step=step + 1, left_out=len(rollouts) - seen, of=len(rollouts))

    def metrics(self) -> Mapping[str, float]:
        """Means over the texts of the last step; of all steps of this process, how many texts were too old, without an answer,
        or held tokens that the teacher does not know.
        """
        return self._metrics

    def _write(self, slots: Sequence[Slot]) -> list[Rollout]:
        began = time.monotonic()
        examples = [self._examples[slot.row] for slot in slots]
        # The version stands beside the weights in memory and in a checkpoint: they cannot disagree.
        version = self._version()
        texts = self._sampler.write(
            [example.prompt for example in examples],
            self._config.generation,
            max_sequence_tokens=self._max_sequence_tokens,
            seeds=[text_seed(self._seed, self._context, slot.place) for slot in slots],
        )
        self._writing_s = time.monotonic() - began
        wanted = len(slots) * self._config.generation.samples_per_prompt
        self._num_dropped += wanted - sum(map(len, texts))
        return [
            Rollout(
                token_ids=np.concatenate([example.prompt, text.token_ids]),
                start=len(example.prompt),
                behaviour_logprobs=text.logprobs,
                likeliest=text.likeliest,
                finished=text.finished,
                version=version,
                place=example.place,
                teacher=example.teacher,
                slot=slot.place,
            )
            for slot, example, several in zip(slots, examples, texts, strict=True)
            for text in several
        ]

    def _id(self, step: int, number: int) -> int:
        return step << 32 | number


class _Sums:
    """Means by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def add_all(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.add(name, value)

    def means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def _scored(rollout: Rollout, answer: Distributions, context: int) -> ScoredExample:
    length = len(rollout.token_ids)
    example = Example(
        token_ids=rollout.token_ids,
        mask=np.arange(length) >= rollout.start,
        place=rollout.place,
        num_prompt=rollout.start,
        teacher=rollout.teacher,
    )
    return ScoredExample(
        example=example,
        answer=answer,
        context=context,
        behaviour_logprobs=rollout.behaviour_logprobs,
        group=rollout.slot,
    )


def _overlap(answer: Distributions, rollout: Rollout) -> dict[str, float]:
    """How near the two are at the text's positions: shared share of their likeliest, the teacher's mass on the student's."""
    width = min(answer.token_ids.shape[1], rollout.likeliest.shape[1])
    ours, theirs = rollout.likeliest[:, :width], answer.token_ids[:, :width]
    shared = (ours[:, :, None] == theirs[:, None, :]).any(-1).mean()
    assert answer.query_logprobs is not None
    return {
        "rollout_overlap": float(shared),
        "rollout_teacher_mass": float(np.exp(answer.query_logprobs).sum(-1).mean()),
    }
