"""Encodes blocks of consecutive rows: a pure function of the rows and of what the rows before them told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.student_trainer.train.data.chat.mask import Learned
from stillhouse.student_trainer.train.data.encoding import EncodedRow, num_prompt_tokens
from stillhouse.student_trainer.train.data.prepared.columns import NAMED, BatchBuilder, to_bytes
from stillhouse.student_trainer.train.data.prepared.left_out import why_left_out, why_too_long
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.data.prompt_encoding import TeacherPromptEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.student_trainer.train.data.teacher_prompt import TeacherPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Examples of consecutive rows, and what these told."""

    data: bytes
    """A record batch."""
    names: dict[str, list[str]]
    """Names of its columns that hold places."""
    num_read: int
    """Rows that were encoded."""
    left_out: Counter[str]
    """Rows that were left out, by reason."""
    notes: Counter[str]
    """RowEncoder.notes of these rows."""
    end_ids: tuple[int, ...]
    """Tokens that ended a text or a turn in them."""
    wrote_date: bool
    """A template asked for the date."""
    learned: Learned
    """Knowledge from all rows up to the last of these."""


class BlockEncoder:
    """Encodes blocks with one tokenizer."""

    def __init__(self, tokenizer: Any, settings: ExampleSettings) -> None:
        """Raises StillhouseError: TOKENIZER_INVALID, INVALID_SPEC for a teacher's prompt that is no template."""
        self.rows = settings.make_encoder(tokenizer)
        self.prompts = TeacherPromptEncoder(settings.prompted, self.rows)
        self._data = settings.data
        self._teachers = settings.teachers

    def encode(self, rows: Sequence[DatasetRow], learned: Learned) -> Block:
        """Encodes rows; `learned` is what those before them told. Raises StillhouseError(DATASET_INVALID) for the first bad row."""
        self.rows.learned = learned
        self.rows.forget_counts()
        builder, left_out = BatchBuilder(), Counter[str]()
        for encoded in self.rows.encode_rows(rows):
            teacher, whole = self._teacher(encoded), self.rows.target_mask(encoded.completion_mask)
            prompts, limit = self._prompts_of(encoded, teacher)
            mask = whole[:limit]
            if len(encoded.token_ids) > limit and self._data.overflow == "drop":
                left_out[why_too_long(len(encoded.token_ids), self._data.max_sequence_tokens)] += 1
            elif not mask.any():
                left_out[why_left_out(encoded.row, whole, self._data.max_sequence_tokens)] += 1
            else:
                builder.add(
                    encoded.token_ids[:limit],
                    mask,
                    num_prompt=num_prompt_tokens(encoded.completion_mask[:limit]),
                    path=str(encoded.row.path),
                    number=encoded.row.number,
                    teacher=teacher,
                    prompts=prompts,
                )
        return Block(
            data=to_bytes(builder.finish()),
            names={name: builder.names[name].names for name in NAMED},
            num_read=len(rows),
            left_out=left_out,
            notes=Counter(self.rows.notes),
            end_ids=self.rows.end_ids,
            wrote_date=self.rows.wrote_date,
            learned=self.rows.learned,
        )

    def _prompts_of(self, encoded: EncodedRow, teacher: str) -> tuple[dict[str, TeacherPrompt], int]:
        """Returns the prompts that teachers alone see, and the tokens of the student that are kept."""
        limit = self._data.max_sequence_tokens
        if not self.prompts:
            return {}, limit
        prompts = self.prompts.encode(
            encoded.row, encoded.token_ids, encoded.completion_mask.tolist(), teacher
        )
        room = self.prompts.room(prompts)
        return prompts, limit if room is None else min(limit, max(room, 0))

    def _teacher(self, encoded: EncodedRow) -> str:
        """Returns the row's teacher, from `data.teacher_field`. Raises StillhouseError(DATASET_INVALID)."""
        field = self._data.teacher_field
        if not field:
            return ""
        name = encoded.row.text(field)
        if name not in self._teachers:
            raise encoded.row.invalid(
                field, f'is "{name}", which no teacher is called; there are {", ".join(self._teachers)}.'
            )
        return name
