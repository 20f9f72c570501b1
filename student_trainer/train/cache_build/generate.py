"""The part of a cache build in which teachers generate: completions with targets from the same pass, each prompt once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.context_mix import text_seed
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.generate_stream import TextStream
from stillhouse.student_trainer.train.teacher.query import submit_ahead
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

WINDOW_PROMPTS = 64
"""Prompts in flight to a teacher."""
FINISHED = "texts_written.json"
"""File in the run directory: prompts whose completions are in whole shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateJob:
    """The prompts of one context that one teacher continues."""

    context: int
    teacher: TeacherClient
    request: DistributionConfig
    meta: CacheMeta
    generation: RolloutConfig
    seed: int
    room: int
    """Tokens that prompt and completion may have together."""
    prompts: Sequence[tuple[int, Example]]
    """Those without completions, with their number among the training rows."""
    num_stored: int


@dataclass(slots=True)
class FinishedPrompts:
    """Prompts that are done, across the attempts of a run: completions have no address before they are generated."""

    run_dir: RunDir
    numbers: dict[int, set[int]] = field(default_factory=dict)
    """Context to the numbers of its prompts."""

    @classmethod
    def load(cls, run_dir: RunDir) -> FinishedPrompts:
        """Reads what earlier attempts stored; a damaged file counts as none, and prompts are continued again."""
        numbers: dict[int, set[int]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            told = json.loads((run_dir.path / FINISHED).read_bytes())
            numbers = {int(context): {int(each) for each in done} for context, done in told.items()}
        return cls(run_dir, numbers)

    def of_context(self, context: int) -> set[int]:
        """Numbers of the prompts of a context that are done, which the caller adds to."""
        return self.numbers.setdefault(context, set())

    def save(self) -> None:
        """Writes the file; call it once the completions are in whole shards."""
        told: Mapping[str, list[int]] = {str(each): sorted(done) for each, done in self.numbers.items()}
        if any(told.values()):
            write_atomic(self.run_dir.path / FINISHED, json.dumps(told).encode())


def generate(
    job: GenerateJob, stream: TextStream, patience: TeacherWait
) -> Iterator[tuple[int, list[tuple[NDArray[np.int32], Distributions]]]]:
    """Yields each prompt's number, and its sequences with their targets; empty completions are left out.

    Raises what TextStream.get_result raises.
    """

    def submit(_: int, numbered: tuple[int, Example]) -> None:
        number, example = numbered
        stream.submit(
            number,
            example.prompt,
            seed=text_seed(job.seed, job.context, number),
            max_new_tokens=min(job.generation.max_new_tokens, job.room - len(example.prompt)),
            place=example.place,
        )

    for _, (number, example) in submit_ahead(job.prompts, WINDOW_PROMPTS, submit):
        patience.check(None)
        yield (
            number,
            [
                (np.concatenate([example.prompt, text.token_ids]).astype(np.int32), text.distributions)
                for text in stream.get_result(number, patience)
                if text.token_ids.size and text.distributions is not None
            ],
        )
