"""A run's rows in the tokens of teachers whose tokenizers are foreign to the student's: translated once, at the start, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.check_cross_tokenizer import chunk_loss
from stillhouse.student_trainer.config.schema import DataConfig, RunConfig
from stillhouse.student_trainer.train.cross_tokenizer.bridge import Bridge
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

log = structlog.get_logger()


def bridge(
    config: RunConfig, corpus: Corpus, teachers: Mapping[str, TeacherClient], tokenizer: Any
) -> Corpus:
    """The corpus for `teachers` that have been reached, by name; `tokenizer` is the student's. Raises StillhouseError."""
    student_json, roles = tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map
    own = tokenizer_fingerprint(student_json, roles)
    for name, teacher in teachers.items():
        if teacher.info.tokenizer_fingerprint == own:
            log.warning(
                "the teacher has the student's tokenizer: loss.foreign_tokenizer: refuse would compare whole distributions",
                teacher=name,
            )
    bridges = {
        name: Bridge(
            student_json,
            teacher.tokenizer_json,
            student_roles=roles,
            teacher_end_ids=teacher.info.eos_token_ids,
            words=chunk_loss(config).chunks == "words",
        )
        for name, teacher in teachers.items()
    }
    for name, each in bridges.items():
        if each.teacher_size != teachers[name].info.tokenizer_size:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The teacher at {teachers[name].config.targets[0]} sent a tokenizer of {each.teacher_size} tokens, and says that "
                f"it has {teachers[name].info.tokenizer_size}. Restart it, and bring both sides to the same version.",
            )
    limit = min(teacher.info.max_sequence_tokens for teacher in teachers.values())
    return bridged_corpus(corpus, bridges, config.data, max_sequence_tokens=limit)


def bridged_corpus(
    corpus: Corpus, bridges: Mapping[str, Bridge], data: DataConfig, *, max_sequence_tokens: int
) -> Corpus:
    """The examples with the text as their teacher reads it; `bridges` by the teachers' names.

    Rows without a chunk that can be compared are left out, and so are those beyond `max_sequence_tokens` of the teacher's
    tokens with overflow "drop". Raises StillhouseError: SEQUENCE_TOO_LONG, or DATASET_INVALID if no row is left.
    """
    rows = _Rows(bridges, data, max_sequence_tokens)
    train, parts, first = [], [], 0
    for number in corpus.parts:
        kept = rows.translated(corpus.train[first : first + number])
        train += kept
        parts.append(len(kept))
        first += number
    held_out = rows.translated(corpus.eval)
    _report(bridges.values(), rows)
    if not train:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            "data.train has no row of which the student's tokens and the teacher's end at the same place twice within what is "
            "learnt. Give rows with longer completions, or set loss.chunks: shortest.",
        )
    return Corpus(train=train, eval=held_out, parts=parts)


class _Rows:
    """Translates rows, and counts what is left out."""

    def __init__(self, bridges: Mapping[str, Bridge], data: DataConfig, max_sequence_tokens: int) -> None:
        self._bridges = bridges
        self._data = data
        self._limit = max_sequence_tokens
        self.too_long = 0
        self.nothing_aligned = 0

    def translated(self, examples: Sequence[Example]) -> list[Example]:
        kept = []
        for each in examples:
            bridge = self._bridges[each.teacher if self._data.teacher_field else next(iter(self._bridges))]
            foreign = bridge.translate(each)
            if foreign is None:
                self.nothing_aligned += 1
            elif len(foreign.token_ids) > self._limit:
                self._refuse_unless_dropped(each, len(foreign.token_ids))
            else:
                kept.append(replace(each, foreign=foreign))
        return kept

    def _refuse_unless_dropped(self, example: Example, number: int) -> None:
        if self._data.overflow == "drop":
            self.too_long += 1
            return
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{example.place} has {number} tokens for the teacher, which takes at most {self._limit}, and "
            f"{len(example.token_ids)} for the student. Lower data.max_sequence_tokens, set data.overflow: drop, or start the "
            "teacher with a larger --max-sequence-tokens.",
            metadata={"value": str(number), "limit": str(self._limit)},
        )


def _report(bridges: Iterable[Bridge], rows: _Rows) -> None:
    accounts = [each.account for each in bridges]
    targets = sum(each.num_targets for each in accounts)
    log.info(
        "text aligned with a foreign tokenizer",
        chunks=sum(each.num_chunks for each in accounts),
        aligned_share=round(sum(each.num_aligned for each in accounts) / max(targets, 1), 4),
        rows_by_offsets=sum(each.num_inexact for each in accounts),
    )
    marks = {mark: number for each in accounts for mark, number in each.marks_left_out.items()}
    if marks:
        log.warning("special tokens that the teacher does not know are left out of its text", marks=marks)
    if rows.too_long or rows.nothing_aligned:
        log.warning("rows left out", too_long=rows.too_long, nothing_aligned=rows.nothing_aligned)
