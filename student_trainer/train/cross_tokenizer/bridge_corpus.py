"""Translates a run's rows for teachers with another tokenizer, once at the start, and reports the alignment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.rules.cross_tokenizer import chunk_loss
from stillhouse.student_trainer.config.schema import DataConfig, RunConfig
from stillhouse.student_trainer.train.cross_tokenizer.bridge import Bridge
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

log = structlog.get_logger()


def translate_for_teachers(
    config: RunConfig, corpus: Corpus, teachers: Mapping[str, TeacherClient], tokenizer: Any
) -> Corpus:
    """Translates the corpus for connected `teachers`, by name; `tokenizer` is the student's. Raises StillhouseError."""
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
            student_end_ids=corpus.end_ids,
            words=chunk_loss(config).chunks == "words",
        )
        for name, teacher in teachers.items()
    }
    for name, each in bridges.items():
        if each.teacher_size != teachers[name].info.tokenizer_size:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The teacher at {teachers[name].config.targets[0]} sent a tokenizer of {each.teacher_size} tokens, but reports "
                f"{teachers[name].info.tokenizer_size}. Restart it, and bring both sides to the same version.",
            )
    limit = min(teacher.info.max_sequence_tokens for teacher in teachers.values())
    return translate_corpus(corpus, bridges, config.data, max_sequence_tokens=limit)


def translate_corpus(
    corpus: Corpus, bridges: Mapping[str, Bridge], data: DataConfig, *, max_sequence_tokens: int
) -> Corpus:
    """Translates each example for its teacher; `bridges` are by the teachers' names.

    Rows without a complete chunk are left out, and with overflow "drop" also those beyond `max_sequence_tokens` of the
    teacher's tokens. Raises StillhouseError: SEQUENCE_TOO_LONG, or DATASET_INVALID if no row is left.
    """
    rows = _RowTranslator(bridges, data, max_sequence_tokens)
    train, sizes, first = [], [], 0
    for number in corpus.dataset_sizes:
        kept = rows.translated(corpus.train[first : first + number])
        train += kept
        sizes.append(len(kept))
        first += number
    held_out = rows.translated(corpus.eval)
    _report(bridges.values(), rows)
    if not train:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            "data.train has no row with two common token boundaries of student and teacher within its targets. "
            "Give rows with longer completions, or set loss.chunks: shortest.",
        )
    return replace(corpus, train=train, eval=held_out, dataset_sizes=sizes)


class _RowTranslator:
    """Translates rows and counts those left out."""

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
            aligned = bridge.translate(each)
            if aligned is None:
                self.nothing_aligned += 1
            elif len(aligned.token_ids) > self._limit:
                self._refuse_unless_dropped(each, len(aligned.token_ids))
            else:
                kept.append(replace(each, aligned=aligned))
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


def _report(bridges: Iterable[Bridge], rows: _RowTranslator) -> None:
    stats = [each.stats for each in bridges]
    targets = sum(each.num_targets for each in stats)
    log.info(
        "text aligned with the teacher's tokenizer",
        chunks=sum(each.num_chunks for each in stats),
        aligned_share=round(sum(each.num_aligned for each in stats) / max(targets, 1), 4),
        rows_by_offsets=sum(each.num_inexact for each in stats),
    )
    dropped = {token: number for each in stats for token, number in each.dropped_special_tokens.items()}
    if dropped:
        log.warning("special tokens that the teacher lacks are dropped from its text", tokens=dropped)
    if rows.too_long or rows.nothing_aligned:
        log.warning("rows left out", too_long=rows.too_long, nothing_aligned=rows.nothing_aligned)
