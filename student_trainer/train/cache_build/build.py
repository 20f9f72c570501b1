"""A run with task: cache: asks the teachers what training would ask, lets them write where a context does, and keeps all of it.

What is stored is not asked again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.cache.reader import shard_paths
from stillhouse.protos.cache.summary import summary
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import Attempt, write_whole
from stillhouse.student_trainer.train.cache_build.generate import TextJob, Written, texts
from stillhouse.student_trainer.train.contexts.source import Skips
from stillhouse.student_trainer.train.data.corpus import Corpus, load_corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.outcome import Outcome
from stillhouse.student_trainer.train.process.reporter import Reporter
from stillhouse.student_trainer.train.process.waiting import Patience, Stopped
from stillhouse.student_trainer.train.student.student import load_tokenizer
from stillhouse.student_trainer.train.teacher.answers import offered, training_request
from stillhouse.student_trainer.train.teacher.generate_stream import TextStream
from stillhouse.student_trainer.train.teacher.queries import (
    Question,
    evaluation_questions,
    training_questions,
)
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.score_stream import ScoreStream
from stillhouse.student_trainer.train.teacher.teacher import Demands, TeacherClient
from stillhouse.student_trainer.train.teacher.teachers import Teachers

log = structlog.get_logger()

WINDOW_SEQUENCES = 128
"""Sequences in flight to a teacher at most."""
SUMMARY = "cache.json"
"""In exports/: what the cache holds; client/commands/cache.py shows it."""


def build(config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool]) -> Outcome:
    """Fills the run's cache until every question has its answer, or until it shall stop.

    Raises:
        StillhouseError: for all that a user can cause; nothing that was stored is lost.
    """
    with ExitStack() as stack:
        work: _Build | None = None
        try:
            work = _Build.prepare(config, attempt, stop_requested, stack)
            work.ask_all()
        except Stopped:
            if work:
                work.finish()
            return Outcome(kind="stopped", step=work.step if work else 0)
        work.finish()
        return Outcome(kind="completed", step=work.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One kind of questions to one teacher."""

    teacher: TeacherClient
    request: DistributionConfig
    meta: CacheMeta
    examples: Sequence[Example]
    """Each with another address; those that are stored left out."""
    num_stored: int


class _Build:
    """The parts of a build, ready to ask."""

    def __init__(
        self, config: RunConfig, attempt: Attempt, patience: Patience, writer: CacheWriter, reporter: Reporter
    ) -> None:
        self._config = config
        self._attempt = attempt
        self._patience = patience
        self._writer = writer
        self._reporter = reporter
        self._skips = Skips()
        self._jobs: list[_Job] = []
        self._texts: list[TextJob] = []
        self._written = Written.load(attempt.run_dir)
        self._just_written: list[tuple[int, int]] = []
        self._rows_per_step = config.optimizer.micro_batch_size * config.optimizer.grad_accum_steps
        self._num_done = 0
        self._num_asked = 0
        self._num_tokens = 0
        self._since = self._flushed_at = time.monotonic()

    @classmethod
    def prepare(
        cls, config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool], stack: ExitStack
    ) -> _Build:
        """Reads the data, checks the teachers and finds what is stored."""
        reporter = stack.enter_context(Reporter(attempt))
        data_dir = attempt.run_dir.path.resolve().parent.parent
        patience = Patience(attempt, stop_requested, config.retry.teacher_wait_s)
        tokenizer = load_tokenizer(config.student, data_dir)
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        fingerprint = tokenizer_fingerprint(tokenizer_json, tokenizer.special_tokens_map)
        names = [teacher.name for teacher in config.teachers]
        corpus = load_corpus(config.data, config.evaluation, tokenizer, data_dir, names)
        demands = Demands.of(config, fingerprint, tokenizer_json, corpus)
        cache = RunCache.open(config.cache, data_dir, stack)
        assert cache is not None, "checked with the configuration"
        assert cache.writer is not None, "checked with the configuration"
        teachers = Teachers.connect(config, demands, attempt.run_dir, patience=patience, stack=stack)
        built = cls(config, attempt, patience, cache.writer, reporter)
        for number, context in enumerate(config.contexts):
            for name, teacher in teachers.members.items() if context.teacher else ():
                built._plan_texts(number, name, teacher, corpus)
        for question in [*training_questions(config, corpus), *evaluation_questions(config, corpus)]:
            for name, teacher in teachers.members.items():
                built._plan(question, name, teacher)
        built._num_done = sum(job.num_stored for job in built._jobs)
        built._num_done += sum(job.num_stored for job in built._texts)
        reporter.resume_at(built.step)
        attempt.report("started", total_steps=built._total_steps, step=built.step)
        log.info("cache is built", sequences=built._num_all, stored=built._num_done, path=str(cache.path))
        return built

    @property
    def step(self) -> int:
        """Whole steps' worth of sequences that are answered; all of them once the last one is."""
        if self._num_done == self._num_all:
            return self._total_steps
        return self._num_done // self._rows_per_step

    def ask_all(self) -> None:
        """Asks what is missing. Raises Stopped, and StillhouseError as the streams' `take` does."""
        for text_job in self._texts:
            texts_of = TextStream(text_job.teacher, text_job.generation, text_job.request)
            try:
                self._let_write(text_job, texts_of)
            finally:
                texts_of.close()
        for job in self._jobs:
            stream = ScoreStream(job.teacher, job.request)
            try:
                self._ask(job, stream)
            finally:
                stream.close()

    def finish(self) -> None:
        """Closes the last shards, and leaves a summary and links to all shards among the run's artifacts."""
        self._flush()
        folder = self._attempt.run_dir.path / "exports"
        shards = folder / "cache"
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
        told = summary(self._writer.reader)
        write_whole(folder / SUMMARY, json.dumps(told, indent=2).encode() + b"\n")
        for path in shard_paths(self._writer.path):
            _link(path, shards / path.name)
        if told["bytes_per_token"] is not None:
            log.info(
                "cache written",
                path=str(self._writer.path),
                sequences=told["sequences"],
                tokens=told["tokens"],
                bytes=told["bytes"],
                bytes_per_token=round(told["bytes_per_token"], 1),
            )
        self._report()

    @property
    def _num_all(self) -> int:
        asked = sum(job.num_stored + len(job.examples) for job in self._jobs)
        return asked + sum(job.num_stored + len(job.prompts) for job in self._texts)

    @property
    def _total_steps(self) -> int:
        return -(-self._num_all // self._rows_per_step)

    def _plan(self, question: Question, name: str, teacher: TeacherClient) -> None:
        request = offered(question.request(teacher.config), teacher.info)
        meta = RunCache.meta(teacher, request, held_out=question.held_out)
        examples = {meta.key(each.token_ids, each.start): each for each in question.of(name)}
        missing = [each for key, each in examples.items() if not self._writer.has(key, meta)]
        self._jobs.append(
            _Job(
                teacher=teacher,
                request=request,
                meta=meta,
                examples=missing,
                num_stored=len(examples) - len(missing),
            )
        )

    def _plan_texts(self, number: int, name: str, teacher: TeacherClient, corpus: Corpus) -> None:
        context = self._config.contexts[number]
        assert context.teacher is not None
        asked = training_request(self._config.loss_of(context), self._config.data.seed)(teacher.config)
        request = offered(asked, teacher.info)
        done = self._written.of(number)
        room = min(self._config.data.max_sequence_tokens, teacher.info.max_sequence_tokens)
        routed = bool(self._config.data.teacher_field)
        mine = [
            (row, each)
            for row, each in enumerate(corpus.train)
            if (not routed or each.teacher == name) and len(each.prompt) < room
        ]
        self._texts.append(
            TextJob(
                context=number,
                teacher=teacher,
                request=request,
                meta=RunCache.meta(teacher, request),
                generation=context.teacher.generation,
                seed=self._config.data.seed,
                room=room,
                prompts=[(row, each) for row, each in mine if row not in done],
                num_stored=sum(row in done for row, _ in mine),
            )
        )

    def _let_write(self, job: TextJob, stream: TextStream) -> None:
        for row, written in texts(job, stream, self._patience):
            self._attempt.check_fence()
            for token_ids, answer in written:
                self._writer.add(job.meta, token_ids, answer)
                self._num_tokens += answer.num_rows
            self._just_written.append((job.context, row))
            self._count()

    def _ask(self, job: _Job, stream: ScoreStream) -> None:
        asked = 0
        for number, example in enumerate(job.examples):
            while asked < min(number + WINDOW_SEQUENCES, len(job.examples)):
                ahead = job.examples[asked]
                question = TeacherQuery(token_ids=ahead.token_ids, start=ahead.start, place=ahead.place)
                stream.submit(asked, question)
                asked += 1
            self._patience.check(None)
            try:
                answer = stream.take(number, self._patience)
            except StillhouseError as error:
                self._skips.count(error, self._num_asked + stream.num_asked)
            else:
                self._attempt.check_fence()
                self._writer.add(job.meta, example.token_ids, answer)
                self._num_tokens += answer.num_rows
            self._count()
        self._num_asked += stream.num_asked

    def _count(self) -> None:
        """One more sequence is answered: a step is reported, and a shard closed, where it completes one."""
        before = self.step
        self._num_done += 1
        if self.step == before:
            return
        every, age_s = self._config.checkpoint.every_steps, self._config.checkpoint.every_seconds
        waited_s = time.monotonic() - self._flushed_at
        if (every and self.step % every == 0) or (age_s is not None and waited_s >= age_s):
            self._flush()
        self._report()

    def _flush(self) -> None:
        self._attempt.check_fence()
        self._writer.flush()
        for context, row in self._just_written:
            self._written.of(context).add(row)
        self._just_written = []
        self._written.save()
        self._flushed_at = time.monotonic()

    def _report(self) -> None:
        shards = self._writer.reader.shards
        tokens, num_bytes = (
            sum(shard.num_tokens for shard in shards),
            sum(shard.num_bytes for shard in shards),
        )
        values = {
            "cache/sequences": float(self._num_done),
            "cache/tokens_per_second": self._num_tokens / max(time.monotonic() - self._since, 1e-9),
            "cache/bytes": float(num_bytes),
        }
        if tokens:
            values["cache/bytes_per_token"] = num_bytes / tokens
        self._reporter.metrics(self.step, values)


def _link(path: Path, place: Path) -> None:
    """The file under a further name; left out where the file system has no such names: the cache itself has it."""
    with suppress(OSError):
        os.link(path, place)
