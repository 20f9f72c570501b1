"""The part of a build that lets teachers write: their texts with the distributions of the same pass, each prompt once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.run_dir import RunDir, write_whole
from stillhouse.student_trainer.train.data.context_mix import text_seed
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.teacher.generate_stream import TextStream
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

WINDOW_PROMPTS = 64
"""Prompts in flight to a teacher."""
WRITTEN = "texts_written.json"
"""In the run directory: the prompts whose texts are in whole shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextJob:
    """The prompts of one context that one teacher continues."""

    context: int
    teacher: TeacherClient
    request: DistributionConfig
    meta: CacheMeta
    generation: RolloutConfig
    seed: int
    room: int
    """Tokens that prompt and text may have together."""
    prompts: Sequence[tuple[int, Example]]
    """Those not written yet, by their number among the training rows."""
    num_stored: int


@dataclass(slots=True)
class Written:
    """Which prompts are done, across the attempts of a run: texts have no address before they are written."""

    run_dir: RunDir
    numbers: dict[int, set[int]] = field(default_factory=dict)
    """Context to the numbers of its prompts."""

    @classmethod
    def load(cls, run_dir: RunDir) -> Written:
        """What earlier attempts wrote down; a file that cannot be read counts as none, and prompts are written again."""
        numbers: dict[int, set[int]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            told = json.loads((run_dir.path / WRITTEN).read_bytes())
            numbers = {int(context): {int(each) for each in done} for context, done in told.items()}
        return cls(run_dir, numbers)

    def of(self, context: int) -> set[int]:
        """The prompts of a context that are done."""
        return self.numbers.setdefault(context, set())

    def save(self) -> None:
        """Writes it down; call it once the texts are in whole shards."""
        told: Mapping[str, list[int]] = {str(each): sorted(done) for each, done in self.numbers.items()}
        if any(told.values()):
            write_whole(self.run_dir.path / WRITTEN, json.dumps(told).encode())


def texts(
    job: TextJob, stream: TextStream, patience: Patience
) -> Iterator[tuple[int, list[tuple[NDArray[np.int32], Distributions]]]]:
    """Prompt after prompt its number, and its texts with prompt and distributions; empty texts are left out.

    Raises what TextStream.take raises.
    """
    asked = 0
    for place, (number, example) in enumerate(job.prompts):
        while asked < min(place + WINDOW_PROMPTS, len(job.prompts)):
            _submit(job, stream, *job.prompts[asked])
            asked += 1
        patience.check(None)
        prompt = example.prompt
        yield (
            number,
            [
                (np.concatenate([prompt, text.token_ids]).astype(np.int32), text.distributions)
                for text in stream.take(number, patience)
                if text.token_ids.size and text.distributions is not None
            ],
        )


def _submit(job: TextJob, stream: TextStream, number: int, example: Example) -> None:
    stream.submit(
        number,
        example.prompt,
        seed=text_seed(job.seed, job.context, number),
        max_new_tokens=min(job.generation.max_new_tokens, job.room - len(example.prompt)),
        place=example.place,
    )
