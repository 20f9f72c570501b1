"""The task "cache": queries teachers for what training would query, lets them generate where a context does, and stores it all.

What is stored is not queried again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np
import structlog

from stillhouse.protos.cache.reader import shard_paths
from stillhouse.protos.cache.summary import summary
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.cache_build.plan import (
    BuildPlan,
    FinishedPrompts,
    GenerateJob,
    ScoreJob,
)
from stillhouse.student_trainer.train.contexts.source import Skips
from stillhouse.student_trainer.train.data.context_mix import text_seed
from stillhouse.student_trainer.train.process.waiting import Stopped
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import Outcome, RunScope, open_scope
from stillhouse.student_trainer.train.setup.teacher_side import connect_teachers, settle_online
from stillhouse.student_trainer.train.teacher.query import submit_ahead
from stillhouse.student_trainer.train.teacher.streams.generated import TextStream
from stillhouse.student_trainer.train.teacher.streams.scored import ScoreStream

log = structlog.get_logger()

WINDOW_SEQUENCES = 128
"""Sequences in flight to a teacher at most."""
WINDOW_PROMPTS = 64
"""Prompts in flight to a teacher at most."""
SUMMARY = "cache.json"
"""In exports/: what the cache holds; client/commands/cache.py shows it."""


def build(config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool]) -> Outcome:
    """Fills the run's cache until it holds the targets of every query, or until the run is asked to stop.

    Raises:
        StillhouseError: for all that a user can cause; nothing that was stored is lost.
    """
    with open_scope(config, attempt, stop_requested) as scope:
        try:
            work = _Build.set_up(scope)
        except Stopped:
            return Outcome(kind="stopped", step=0)
        try:
            work.query_all()
        except Stopped:
            work.finish()
            return Outcome(kind="stopped", step=work.step)
        work.finish()
        return Outcome(kind="completed", step=work.step)


class _Build:
    """A build, ready to query."""

    def __init__(
        self, scope: RunScope, plan: BuildPlan, writer: CacheWriter, finished: FinishedPrompts
    ) -> None:
        self._scope = scope
        self._plan = plan
        self._writer = writer
        self._finished = finished
        self._just_finished: list[tuple[int, int]] = []
        self._skips = Skips()
        optimizer = scope.config.optimizer
        self._rows_per_step = optimizer.rows_per_update
        self._num_done = plan.num_stored
        self._num_asked = 0
        self._num_tokens = 0
        self._since = self._flushed_at = time.monotonic()

    @classmethod
    def set_up(cls, scope: RunScope) -> _Build:
        """Reads the data, reaches the teachers and finds what is stored."""
        inputs = Inputs.load(scope)
        teachers = connect_teachers(scope, inputs)
        scope = replace(scope, config=settle_online(scope, inputs, teachers))
        cache = teachers.cache
        assert cache is not None, "checked with the configuration"
        assert cache.writer is not None, "checked with the configuration"
        finished = FinishedPrompts.load(scope.run_dir)
        plan = BuildPlan.make(scope.config, inputs.corpus, teachers, cache.writer, finished)
        built = cls(scope, plan, cache.writer, finished)
        scope.reporter.resume_at(built.step)
        scope.attempt.report("started", total_steps=built._total_steps, step=built.step)
        log.info("cache is built", sequences=plan.num_all, stored=plan.num_stored, path=str(cache.path))
        return built

    @property
    def step(self) -> int:
        """Whole steps' worth of sequences that are done; all of them once the last one is."""
        if self._num_done == self._plan.num_all:
            return self._total_steps
        return self._num_done // self._rows_per_step

    def query_all(self) -> None:
        """Queries what is missing. Raises Stopped, and StillhouseError as the streams' `take` does."""
        for generate in self._plan.generate_jobs:
            with closing(TextStream(generate.teacher, generate.generation, generate.request)) as texts:
                self._generate(generate, texts)
        for score in self._plan.score_jobs:
            with closing(ScoreStream(score.teacher, score.request)) as targets:
                self._score(score, targets)

    def finish(self) -> None:
        """Closes the last shards; puts a summary and links to all shards among the run's artifacts."""
        self._flush()
        folder = self._scope.attempt.run_dir.path / "exports"
        shards = folder / "cache"
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
        told = summary(self._writer.reader)
        write_atomic(folder / SUMMARY, json.dumps(told, indent=2).encode() + b"\n")
        for path in shard_paths(self._writer.path):
            # A link is not needed where the file system has none: the cache itself has the file.
            with suppress(OSError):
                os.link(path, shards / path.name)
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
    def _total_steps(self) -> int:
        return -(-self._plan.num_all // self._rows_per_step)

    def _generate(self, job: GenerateJob, stream: TextStream) -> None:
        examples = job.missing.source

        def submit(_: int, row: int) -> None:
            example = examples[row]
            stream.submit(
                row,
                job.prompt(example),
                seed=text_seed(job.seed, job.context, row),
                max_new_tokens=job.max_new_tokens(example),
                place=example.place,
            )

        for _, row in submit_ahead(job.missing.numbers, WINDOW_PROMPTS, submit):
            example = examples[row]
            self._scope.patience.check(None)
            texts = stream.get_result(row, self._scope.patience)
            prompt = job.prompt(example)
            self._scope.attempt.check_fence()
            for text in texts:
                if text.token_ids.size and text.distributions is not None:
                    token_ids = np.concatenate([prompt, text.token_ids]).astype(np.int32)
                    self._writer.add(
                        job.meta,
                        token_ids,
                        text.distributions,
                        student_prompt_ids=job.student_prompt(example),
                    )
                    self._num_tokens += text.distributions.num_rows
            self._just_finished.append((job.context, row))
            self._count()

    def _score(self, job: ScoreJob, stream: ScoreStream) -> None:
        def submit(number: int, row: int) -> None:
            stream.submit(number, job.query(row))

        for number, row in submit_ahead(job.missing.numbers, WINDOW_SEQUENCES, submit):
            query = job.query(row)
            self._scope.patience.check(None)
            try:
                answer = stream.get_result(number, self._scope.patience)
            except StillhouseError as error:
                self._skips.count(error, self._num_asked + stream.num_asked)
            else:
                self._scope.attempt.check_fence()
                self._writer.add(
                    job.meta,
                    query.token_ids,
                    answer,
                    token_type_ids=query.token_type_ids,
                    student_prompt_ids=query.student_prompt,
                )
                self._num_tokens += answer.num_rows
            self._count()
        self._num_asked += stream.num_asked

    def _count(self) -> None:
        """Counts a sequence; reports a step, and closes a shard, if it completes one."""
        before = self.step
        self._num_done += 1
        if self.step == before:
            return
        every, age_s = self._scope.config.checkpoint.every_steps, self._scope.config.checkpoint.every_seconds
        waited_s = time.monotonic() - self._flushed_at
        if (every and self.step % every == 0) or (age_s is not None and waited_s >= age_s):
            self._flush()
        self._report()

    def _flush(self) -> None:
        self._scope.attempt.check_fence()
        self._writer.flush()
        for context, row in self._just_finished:
            self._finished.numbers[context].add(row)
        self._just_finished = []
        self._finished.save()
        self._flushed_at = time.monotonic()

    def _report(self) -> None:
        shards = self._writer.reader.shards
        tokens, num_bytes = sum(each.num_tokens for each in shards), sum(each.num_bytes for each in shards)
        values = {
            "cache/sequences": float(self._num_done),
            "cache/tokens_per_second": self._num_tokens / max(time.monotonic() - self._since, 1e-9),
            "cache/bytes": float(num_bytes),
        }
        if tokens:
            values["cache/bytes_per_token"] = num_bytes / tokens
        self._scope.reporter.metrics(self.step, values)
