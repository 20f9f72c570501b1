"""The plan of a cache build: the sequences to score and the prompts to continue, less what is stored already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.train.cache_build.generate import FinishedPrompts, GenerateJob
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.target_requests import (
    TargetRequest,
    evaluation_requests,
    training_request,
    training_requests,
)
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """The sequences that one teacher scores for one request."""

    teacher: TeacherClient
    request: DistributionConfig
    meta: CacheMeta
    examples: Sequence[Example]
    """Those that are not stored, each with another address."""
    num_stored: int


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
        scored = sum(job.num_stored for job in self.score_jobs)
        return scored + sum(job.num_stored for job in self.generate_jobs)

    @property
    def num_all(self) -> int:
        """Sequences and prompts of the whole cache."""
        missing = sum(len(job.examples) for job in self.score_jobs)
        return self.num_stored + missing + sum(len(job.prompts) for job in self.generate_jobs)


def _plan_scores(
    request: TargetRequest, teacher: TeacherClient, wanted: Sequence[Example], writer: CacheWriter
) -> ScoreJob:
    config = request.to_config(teacher.config, teacher.info)
    meta = RunCache.make_meta(teacher, config, held_out=request.held_out)
    examples = {meta.key(each.token_ids, each.start): each for each in wanted}
    missing = [each for key, each in examples.items() if not writer.has(key, meta)]
    return ScoreJob(
        teacher=teacher,
        request=config,
        meta=meta,
        examples=missing,
        num_stored=len(examples) - len(missing),
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
            done = finished.of_context(number)
            prompts = [
                (row, each)
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
                prompts=[(row, each) for row, each in prompts if row not in done],
                num_stored=sum(row in done for row, _ in prompts),
            )
