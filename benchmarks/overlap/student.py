"""Blocks of steps with the training process's own parts, and targets from a teacher, from a cache, or in memory.

Only the targets' origin differs: student, optimizer, rows, batches and loss are shared.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import structlog
import torch

from benchmarks.teacher.models import make_tokenizer
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress, TrainingState
from stillhouse.student_trainer.train.contexts.source import StepData
from stillhouse.student_trainer.train.setup.feeds import FeedFactory
from stillhouse.student_trainer.train.setup.held_out import HeldOutRows
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import RunScope, open_scope
from stillhouse.student_trainer.train.setup.student_side import StudentSide
from stillhouse.student_trainer.train.setup.teacher_side import TeacherSide
from stillhouse.student_trainer.train.step import Stepper
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from tests.support.small_models import make_model

VOCABULARY = 4096
HIDDEN, LAYERS, HEADS = 384, 4, 6
"""Shape of the student; the teacher is as wide."""
BATCH, LENGTH, TOP_K = 4, 128, 64
ROWS = 16 * BATCH
STEPS = 1_000_000
"""An upper bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """Folders of the two models."""

    teacher: Path
    student: Path


def make_models(directory: Path, teacher_layers: int) -> Models:
    """Writes a randomly initialised teacher and student with one tokenizer."""
    tokenizer = make_tokenizer(directory / "tokenizer", VOCABULARY)

    def made(name: str, num_layers: int, seed: int) -> Path:
        return make_model(
            directory / name,
            tokenizer_dir=tokenizer,
            hidden_size=HIDDEN,
            num_layers=num_layers,
            num_heads=HEADS,
            seed=seed,
        )

    return Models(teacher=made("teacher", teacher_layers, 1), student=made("student", LAYERS, 2))


def write_rows(path: Path, count: int, length: int) -> Path:
    """Writes texts of more than `length` tokens each, truncated to it, so that all steps cost the same."""
    chooser = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    with path.open("w") as file:
        for _ in range(count):
            words = ["".join(chooser.choice(syllables, 3)) for _ in range(length)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


class Student:
    """A student, with its step data by the origin of the targets."""

    def __init__(self, stepper: Stepper, sources: dict[str, Iterator[StepData]], stack: ExitStack) -> None:
        self._stepper = stepper
        self._sources = sources
        self._stack = stack
        self._progress = Progress()
        self.waited_s = 0.0
        """Wait of timed steps for the teacher."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @classmethod
    def open(cls, directory: Path, model: Path, data: Path, target: str) -> Student:
        """Queries the teacher once for every row, into memory and into a cache."""
        torch.set_num_threads(1)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
        with ExitStack() as stack:
            stages = _Stages(directory, model, data, target, stack)
            epoch = ROWS // BATCH
            filling = stages.steps("write_through", stages.config("write_through"))
            in_memory = list(itertools.islice(filling, epoch))
            stages.close_cache()
            sources: dict[str, Iterator[StepData]] = {
                "alone": itertools.cycle(in_memory),
                "online": stages.steps("online", stages.config(None)),
                "cached": stages.steps("cached", stages.config("only")),
            }
            kept = stack.pop_all()
        return cls(stages.stepper, sources, kept)

    def rates(self) -> tuple[float, float]:
        """Tokens per second of the teacher alone, and of the student alone."""
        epoch = ROWS // BATCH
        for _ in range(epoch):
            next(self._sources["online"])
        began = time.perf_counter()
        for _ in range(2 * epoch):
            next(self._sources["online"])
        teacher_s = (time.perf_counter() - began) / (2 * epoch)
        tokens = BATCH * LENGTH
        return tokens / teacher_s, tokens / self.block("alone", 3, 8)

    def begin(self, kind: str, steps: int) -> None:
        """Takes untimed steps."""
        for _ in range(steps):
            self._stepper.take_step(next(self._sources[kind]), self._progress)

    def block(self, kind: str, lead_in: int, steps: int) -> float:
        """Seconds per step over `steps` steps, after `lead_in` untimed ones."""
        self.begin(kind, lead_in)
        return sum(self._seconds(kind) for _ in range(steps)) / steps

    def both(self, kinds: Sequence[str], lead_in: int, steps: int) -> dict[str, float]:
        """Seconds per step of two alternating kinds, after `lead_in` steps of the first and one of the second.

        The prefetch of a step from the cache runs within that step.
        """
        first, second = kinds
        self.begin(first, lead_in)
        self.begin(second, 1)
        taken = {first: 0.0, second: 0.0}
        for step in range(steps):
            for kind in (first, second) if step % 2 else (second, first):
                taken[kind] += self._seconds(kind)
        return {kind: seconds / steps for kind, seconds in taken.items()}

    def _seconds(self, kind: str) -> float:
        """Seconds of one step, with the wait for its data."""
        began = time.perf_counter()
        data = next(self._sources[kind])
        self.waited_s += data.teacher_wait_s if kind == "online" else 0.0
        self._stepper.take_step(data, self._progress)
        return time.perf_counter() - began


class _Stages:
    """The stages of a run's set-up, as the training process makes them; the student serves several runs."""

    def __init__(self, directory: Path, model: Path, data: Path, target: str, stack: ExitStack) -> None:
        self._directory, self._model, self._data, self._target = directory, model, data, target
        self._stack = stack
        self._cache_stack = ExitStack()
        stack.callback(self._cache_stack.close)
        scope = self._open("student", self.config(None))
        self._inputs = Inputs.load(scope)
        no_teachers = TeacherSide(
            teachers=OnlineTeachers({}, mixed=False, cache=None),
            corpus=self._inputs.corpus,
            held_out=HeldOutRows.lookup(scope, self._inputs.corpus),
            config=scope.config,
        )
        self._student = StudentSide.load(scope, self._inputs, no_teachers)
        self.stepper = self._student.stepper

    def config(self, cache: str | None) -> RunConfig:
        """Configuration of a run with a cache in this mode, or without one."""
        spec = RunSpec()
        spec.student.model = str(self._model)
        spec.teachers.add(targets=[self._target], logprob_dtype="float16")
        spec.data.train.add(path=str(self._data))
        spec.data.max_sequence_tokens = LENGTH
        spec.data.eval_fraction = 0.0
        spec.loss.top_k, spec.loss.sparse_target = TOP_K, "tail_bucket"
        spec.optimizer.learning_rate = 1e-4
        spec.optimizer.max_steps = STEPS
        spec.optimizer.micro_batch_size = BATCH
        if cache:
            spec.cache.path, spec.cache.mode = "cache", cache
        return from_proto(spec)

    def steps(self, name: str, config: RunConfig) -> Iterator[StepData]:
        """The data of a run's steps, as its loop gets them."""
        scope = self._open(name, config)
        state = TrainingState(
            student=self._student.student,
            optimizer=self._student.optimizer,
            scaler=None,
            progress=Progress(),
        )
        feeds = FeedFactory(
            scope=scope,
            inputs=self._inputs,
            teacher_side=TeacherSide.connect(scope, self._inputs),
            student_side=self._student,
            state=state,
        )
        return feeds.open_source().steps(after=0)

    def close_cache(self) -> None:
        """Writes the cache, so that it can be read."""
        self._cache_stack.close()

    def _open(self, name: str, config: RunConfig) -> RunScope:
        stack = self._cache_stack if name == "write_through" else self._stack
        spec = to_proto(config)
        run_dir = RunDir.create(self._directory / "runs" / name, spec, spec)
        run_dir.write_control(1, stop=False)
        attempt = stack.enter_context(run_dir.open_attempt(1))
        return stack.enter_context(open_scope(config, attempt, lambda: False))
