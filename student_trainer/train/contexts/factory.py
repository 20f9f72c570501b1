"""From the contexts of a run file to the feeds of its source: which teachers each asks, for what, and how far ahead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from stillhouse.student_trainer.config.check_contexts import needs_query, writers
from stillhouse.student_trainer.config.schema import (
    ContextConfig,
    RunConfig,
    StudentContextConfig,
    TeacherConfig,
    TeacherContextConfig,
)
from stillhouse.student_trainer.train.contexts.source import DatasetFeed, Feed
from stillhouse.student_trainer.train.contexts.student_feed import StudentFeed, TextWriter
from stillhouse.student_trainer.train.contexts.teacher_feed import TeacherFeed
from stillhouse.student_trainer.train.contexts.warm_start import WarmStart
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.rollouts.local_sampler import Sampler
from stillhouse.student_trainer.train.rollouts.remote_sampler import RemoteSampler
from stillhouse.student_trainer.train.rollouts.rollout_buffer import InFlight
from stillhouse.student_trainer.train.rollouts.sampler_pool import SharedSampler
from stillhouse.student_trainer.train.student.student import Student
from stillhouse.student_trainer.train.teacher.answers import offered, training_request
from stillhouse.student_trainer.train.teacher.generate_stream import TextStream
from stillhouse.student_trainer.train.teacher.offline_teachers import StoredTeachers
from stillhouse.student_trainer.train.teacher.teachers import Teachers


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What feeds are made of."""

    config: RunConfig
    corpus: Corpus
    teachers: Teachers | StoredTeachers | None
    """None if training asks none."""
    student: Student
    vocab_size: int
    """The effective vocabulary."""
    run_name: str
    tokenizer_fingerprint: str
    in_flight: InFlight
    version: Callable[[], int]
    """Updates that the student's weights have had."""
    is_resumed: bool
    device: torch.device
    autocast: Any
    patience: Patience
    stack: ExitStack
    """Closes the streams."""
    is_first: bool = True
    """Whether this is the first of the run's processes."""

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that may be written: what the run, the teachers and the student take."""
        limits = [self.config.data.max_sequence_tokens, self.student.max_positions]
        limits.append(self.teachers.max_sequence_tokens if self.teachers else None)
        return min(limit for limit in limits if limit is not None)

    @property
    def seed(self) -> int:
        """Of everything that is drawn about data and texts."""
        return self.config.data.seed


def make_feed(context: ContextConfig, number: int, parts: Parts) -> Feed:
    """The feed of `contexts[number]`."""
    if context.teacher is not None:
        return _teacher_feed(context, context.teacher, number, parts)
    if context.student is not None:
        return _student_feed(context, context.student, number, parts)
    loss = parts.config.loss_of(context)
    answers = None
    if loss.asks_teacher:
        assert parts.teachers is not None, "checked with the configuration"
        answers = parts.teachers.answers(training_request(loss, parts.seed), fixed_text=True)
        parts.stack.callback(answers.close)
    return DatasetFeed(
        parts.corpus.train,
        answers,
        context=number,
        prefetch_steps=parts.teachers.prefetch_steps if parts.teachers else 0,
        patience=parts.patience,
    )


def _teacher_feed(
    context: ContextConfig, config: TeacherContextConfig, number: int, parts: Parts
) -> TeacherFeed:
    assert parts.teachers is not None, "checked with the configuration"
    loss = parts.config.loss_of(context)
    request = training_request(loss, parts.seed)
    streams = {}
    for name, teacher in parts.teachers.members.items():
        distributions = offered(request(teacher.config), teacher.info) if loss.asks_teacher else None
        streams[name] = TextStream(teacher, config.generation, distributions)
        parts.stack.callback(streams[name].close)
    return TeacherFeed(
        parts.corpus.train,
        streams,
        config.generation,
        context=number,
        seed=parts.seed,
        vocab_size=parts.vocab_size,
        max_sequence_tokens=parts.max_sequence_tokens,
        prefetch_steps=parts.teachers.prefetch_steps,
        patience=parts.patience,
    )


def _student_feed(
    context: ContextConfig, config: StudentContextConfig, number: int, parts: Parts
) -> StudentFeed:
    assert parts.teachers is not None, "checked with the configuration"
    loss = parts.config.loss_of(context)
    asks_query = needs_query(loss)
    answers = parts.teachers.answers(training_request(loss, parts.seed), fixed_text=False)
    parts.stack.callback(answers.close)
    num_likeliest = min(loss.top_k, parts.teachers.max_query_tokens()) if asks_query else 0
    return StudentFeed(
        parts.corpus.train,
        answers,
        _writer(config, number, num_likeliest, parts),
        config,
        parts.in_flight,
        context=number,
        seed=parts.seed,
        asks_query=asks_query,
        ahead=parts.teachers.prefetch_steps,
        max_sequence_tokens=parts.max_sequence_tokens,
        gate=WarmStart(
            config.min_teacher_logprob,
            vocab_size=parts.vocab_size,
            alone=len(parts.config.contexts) == 1,
            field_path=f"contexts[{number}].student",
            is_open=parts.is_resumed,
        ),
        version=parts.version,
        patience=parts.patience,
    )


def _writer(config: StudentContextConfig, number: int, num_likeliest: int, parts: Parts) -> TextWriter:
    """Who writes with the student's weights."""
    targets = writers(config)
    if not targets:
        return Sampler(
            parts.student,
            device=parts.device,
            autocast=parts.autocast,
            vocab_size=parts.vocab_size,
            num_likeliest=num_likeliest,
        )

    def remote(target: str, patience: Patience) -> RemoteSampler:
        return RemoteSampler(
            parts.student,
            TeacherConfig(
                targets=(target,),
                credential=config.rollout_credential,
                tls_server_name=config.rollout_tls_server_name,
            ),
            field=f"contexts[{number}].student",
            run_name=parts.run_name,
            tokenizer_fingerprint=parts.tokenizer_fingerprint,
            vocab_size=parts.vocab_size,
            num_likeliest=num_likeliest,
            version=parts.version,
            patience=patience,
            clean=parts.is_first,
        )

    writer = (
        SharedSampler(targets, remote, parts.patience)
        if len(targets) > 1
        else remote(targets[0], parts.patience)
    )
    parts.stack.callback(writer.close)
    return writer
