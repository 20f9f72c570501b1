"""Puts each query behind the prompt that its teacher sees alone, and counts the answer's positions as the student does."""

from __future__ import annotations

from dataclasses import replace

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery


class PromptedStream:
    """A TargetStream over that of one teacher, which may be a cache: its keys are those of the ids that the teacher sees."""

    def __init__(self, stream: TargetStream, teacher: str) -> None:
        """`teacher` is the name by which rows hold its prompts."""
        self._stream = stream
        self._teacher = teacher
        self._starts: dict[int, int] = {}

    @property
    def num_asked(self) -> int:
        """Sequences sent to the teacher."""
        return self._stream.num_asked

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        """Sends a query."""
        self._starts[sequence_id] = query.start
        self._stream.submit(sequence_id, query.behind_prompt(self._teacher))

    def get_result(self, sequence_id: int, patience: TeacherWait) -> Distributions:
        """Waits for the result. Raises as the stream below does."""
        start = self._starts.pop(sequence_id)
        answer = self._stream.get_result(sequence_id, patience)
        return answer if answer.start == start else replace(answer, start=start)

    def close(self) -> None:
        """Ends the stream below."""
        self._stream.close()
