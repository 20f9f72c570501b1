"""The longest sequences behind prompts that teachers see alone, compared with what their services take."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoResponse
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.teacher.query import TeacherQuery


def longest_prompted(config: RunConfig, corpus: Corpus) -> dict[str, TeacherQuery]:
    """The longest query behind a prompt of its own, for each teacher by name that has one."""
    first = (*corpus.train[:1], *corpus.eval[:1])
    if all(each.prompt is None for each in config.teachers) and not any(row.teacher_prompts for row in first):
        return {}

    def queries(name: str) -> Iterator[TeacherQuery]:
        for each in chain(corpus.train, corpus.eval):
            if each.teacher_prompts and each.teacher in ("", name):
                yield TeacherQuery.from_example(each).behind_prompt(name)

    longest = {
        each.name: max(queries(each.name), key=lambda query: len(query.token_ids), default=None)
        for each in config.teachers
    }
    return {name: query for name, query in longest.items() if query is not None}


def check_prompt_limit(query: TeacherQuery | None, info: GetTeacherInfoResponse, target: str) -> None:
    """Returns if a teacher takes its longest query, if it has one. Raises StillhouseError(SEQUENCE_TOO_LONG)."""
    if query is None:
        return
    length, limit = len(query.token_ids), info.max_sequence_tokens
    if length > limit:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{query.place} has {length} tokens behind the prompt that the teacher sees alone, {query.start} of them before "
            f"the completion; the teacher at {target} takes at most {limit}. Set teachers[].prompt.max_sequence_tokens: "
            f"{limit}, which cuts or drops such rows as data.overflow says, or start the teacher with a larger "
            "--max-sequence-tokens.",
            metadata={"value": str(length), "limit": str(limit)},
        )
