"""The plan of a cache build: the sequences to score and the prompts to continue, less what is stored already."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.cache.rows import prompt_digest
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.student_trainer.config.schema import RolloutConfig, RunConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.teacher_prompt import prompt_of
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.target_requests import (
    TargetRequest,
    evaluation_requests,
    training_request,
    training_requests,
)
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

FINISHED = "texts_written.json"
"""File in the run directory: prompts whose completions are in whole shards."""


@dataclass(slots=True)
class FinishedPrompts:
    """Prompts that are done, across the attempts of a run: completions have no address before they are generated."""

    run_dir: RunDir
    numbers: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Context to the numbers of its prompts."""

    @classmethod
    def load(cls, run_dir: RunDir) -> FinishedPrompts:
        """Reads what earlier attempts stored; a damaged file counts as none, and prompts are continued again."""
        finished = cls(run_dir)
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            told = json.loads((run_dir.path / FINISHED).read_bytes())
            finished.numbers |= {int(context): {int(each) for each in done} for context, done in told.items()}
        return finished

    def save(self) -> None:
        """Writes the file; call it once the completions are in whole shards."""
        told = {str(each): sorted(done) for each, done in self.numbers.items()}
        if any(told.values()):
            write_atomic(self.run_dir.path / FINISHED, json.dumps(told).encode())


@dataclass(frozen=True, slots=True)
class PickedExamples:
    """Some examples of a sequence, which are read when they are asked for."""

    source: Sequence[Example]
    numbers: Sequence[int]
    """Their places in `source`."""

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateJob:
    """The prompts of one context that one teacher continues: completions with targets from the same pass, each prompt once."""

    context: int
    teacher: TeacherClient
    request: DistributionConfig
    meta: CacheMeta
    generation: RolloutConfig
    seed: int
    room: int
    """Tokens that prompt and completion may have together."""
    teacher_room: int
    """The same with the prompt that the teacher sees."""
    missing: PickedExamples
    """Prompts without completions, with their numbers among the training rows."""
    num_stored: int

    def prompt(self, example: Example) -> NDArray[np.int32]:
        """The prompt of a row as the teacher sees it."""
        return example.prompt_for(self.teacher.config.name)

    def student_prompt(self, example: Example) -> NDArray[np.int32] | None:
        """The student's prompt of a row, if the teacher sees another one."""
        is_prompted = prompt_of(example.teacher_prompts, self.teacher.config.name) is not None
        return example.prompt if is_prompted else None

    def max_new_tokens(self, example: Example) -> int:
        """Most tokens of a row's completion."""
        rooms = self.room - len(example.prompt), self.teacher_room - len(self.prompt(example))
        return min(self.generation.max_new_tokens, *rooms)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """The sequences that one teacher scores for one request."""

    teacher: TeacherClient
    request: DistributionConfig
    meta: CacheMeta
    missing: PickedExamples
    """Sequences that are not stored, each with another address."""
    num_stored: int

    def query(self, number: int) -> TeacherQuery:
        """The query of an example, by its place in `missing.source`."""
        return _query(self.missing.source[number], self.teacher)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """All jobs of a build."""

    generate_jobs: Sequence[GenerateJob]
    score_jobs: Sequence[ScoreJob]

    @classmethod
    def make(
        cls,
        config: RunConfig,
        corpus: Corpus,
        teachers: OnlineTeachers,
        writer: CacheWriter,
        finished: FinishedPrompts,
    ) -> BuildPlan:
        """The jobs of a run with `config`, in the order in which they are done."""
        requests = [*training_requests(config), *evaluation_requests(config, corpus)]
        return cls(
            generate_jobs=list(_plan_generation(config, corpus, teachers, finished)),
            score_jobs=[
                _plan_scores(request, teacher, request.select(corpus, name), writer)
                for request in requests
                for name, teacher in teachers.members.items()
            ],
        )

    @property
    def num_stored(self) -> int:
        """Sequences and prompts that are stored."""
        return sum(job.num_stored for job in self._jobs)

    @property
    def num_all(self) -> int:
        """Sequences and prompts of the whole cache."""
        return self.num_stored + sum(len(job.missing) for job in self._jobs)

    @property
    def _jobs(self) -> list[GenerateJob | ScoreJob]:
        return [*self.generate_jobs, *self.score_jobs]


def _query(example: Example, teacher: TeacherClient) -> TeacherQuery:
    return TeacherQuery.from_example(example).behind_prompt(teacher.config.name)


def _plan_scores(
    request: TargetRequest, teacher: TeacherClient, wanted: Sequence[Example], writer: CacheWriter
) -> ScoreJob:
    config = request.to_config(teacher.config, teacher.info)
    meta = RunCache.make_meta(teacher, config, held_out=request.held_out)
    # Texts of one key differ in the student's prompt alone; each of them is a row of the cache.
    places: dict[tuple[str, bytes], int] = {}
    missing = []
    for place, each in enumerate(_query(example, teacher) for example in wanted):
        key = meta.key(each.token_ids, each.start, None, each.token_type_ids)
        if places.setdefault(
            (key, prompt_digest(each.student_prompt)), place
        ) == place and not writer.has_text(key, meta, each.student_prompt):
            missing.append(place)
    return ScoreJob(
        teacher=teacher,
        request=config,
        meta=meta,
        missing=PickedExamples(wanted, missing),
        num_stored=len(places) - len(missing),
    )


def _plan_generation(
    config: RunConfig, corpus: Corpus, teachers: OnlineTeachers, finished: FinishedPrompts
) -> Iterator[GenerateJob]:
    for number, context in enumerate(config.contexts):
        for name, teacher in teachers.members.items() if context.teacher else ():
            assert context.teacher is not None
            loss = config.loss_of(context)
            request = training_request(loss, config.data.seed).to_config(teacher.config, teacher.info)
            room = min(config.data.max_sequence_tokens, teacher.info.max_sequence_tokens)
            done = finished.numbers[number]
            prompts = [
                row
                for row, each in enumerate(corpus.train)
                if each.teacher in ("", name) and len(each.prompt) < room
            ]
            yield GenerateJob(
                context=number,
                teacher=teacher,
                request=request,
                meta=RunCache.make_meta(teacher, request),
                generation=context.teacher.generation,
                seed=config.data.seed,
                room=room,
                teacher_room=teacher.max_sequence_tokens,
                missing=PickedExamples(corpus.train, [row for row in prompts if row not in done]),
                num_stored=sum(row in done for row in prompts),
            )
