"""A query about one sequence, and the interface of whatever answers it: a teacher, a cache, or several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.teacher_prompt import TeacherPrompt, prompt_of
from stillhouse.student_trainer.train.process.waiting import TeacherWait

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherQuery:
    """A sequence, the positions whose distributions are wanted, and the teacher that its row names."""

    token_ids: NDArray[np.int32]
    """[T]."""
    start: int
    """The distributions at positions [start, T) are wanted."""
    place: str
    """File and row, for errors."""
    teacher: str = ""
    """Name of the row's teacher; empty where rows name none."""
    query_token_ids: NDArray[np.int32] | None = None
    """[T - start, Q]: further ids whose log-probabilities are wanted."""
    teacher_prompts: Mapping[str, TeacherPrompt] = field(default_factory=dict)
    """Prompts that teachers see alone, by their names."""
    student_prompt: NDArray[np.int32] | None = None
    """[S]: the student's tokens before `start`, where those of `token_ids` are a teacher's alone."""
    token_type_ids: NDArray[np.int32] | None = None
    """[T]: segments of a classifier's pair of texts."""
    num_scored: int = 0
    """Tokens at its start that earlier queries about the same text had; 0 for the first one."""

    @classmethod
    def from_example(cls, example: Example) -> TeacherQuery:
        """Queries all targets of `example`, in its teacher's tokens."""
        token_ids, start = example.teacher_tokens
        return cls(
            token_ids=token_ids,
            start=start,
            place=example.place,
            teacher=example.teacher,
            teacher_prompts=example.teacher_prompts,
            token_type_ids=example.token_type_ids,
        )

    def behind_prompt(self, teacher: str) -> TeacherQuery:
        """The query as `teacher`, by its name, sees it: behind its own prompt, if it has one."""
        prompt = prompt_of(self.teacher_prompts, teacher)
        if prompt is None:
            return self
        return replace(
            self,
            token_ids=prompt.before(self.token_ids),
            start=self.start + prompt.shift,
            num_scored=self.num_scored + prompt.shift if self.num_scored else 0,
            teacher_prompts={},
            student_prompt=self.token_ids[: self.start],
        )

    @property
    def num_rows(self) -> int:
        """Number of positions whose distributions are wanted."""
        return len(self.token_ids) - self.start


class TargetStream(Protocol):
    """Distributions for queries, by ids that the caller chooses; the caller bounds how much is in flight."""

    @property
    def num_asked(self) -> int:
        """Sequences sent to teachers."""

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        """Sends a query."""

    def get_result(self, sequence_id: int, patience: TeacherWait) -> Distributions:
        """Waits for the result of a submitted query; each can be taken once."""

    def close(self) -> None:
        """Ends the stream and drops queries without a result."""


def submit_ahead(
    items: Sequence[Item], window: int, submit: Callable[[int, Item], None]
) -> Iterator[tuple[int, Item]]:
    """Yields the items with their indices, after submitting all of the `window` that begins with each."""
    num_submitted = 0
    for index, item in enumerate(items):
        while num_submitted < min(index + window, len(items)):
            submit(num_submitted, items[num_submitted])
            num_submitted += 1
        yield index, item
