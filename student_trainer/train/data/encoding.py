"""Tokenizes a row (chat template or plain) with the student's tokenizer and builds its loss mask.

mask[t] is True if token t is a target, predicted from the tokens before it; position 0 never is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import parse_options, parse_tools
from stillhouse.protos.rows.finish_reason import is_cut_short
from stillhouse.protos.rows.known_fields import ExtraFields
from stillhouse.protos.rows.training_row import TrainingRow
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.schema import DataConfig
from stillhouse.student_trainer.train.data.alignment import AlignedText
from stillhouse.student_trainer.train.data.chat.marks import SpecialMarks
from stillhouse.student_trainer.train.data.chat.mask import ChatMasker, Learned, Span
from stillhouse.student_trainer.train.data.chat.template import ChatTemplate
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.student_trainer.train.data.teacher_prompt import TeacherPrompt, prompt_of
from stillhouse.student_trainer.train.data.text_encoder import TextEncoder, TextRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training sequence."""

    token_ids: NDArray[np.int32]
    """[T]."""
    mask: NDArray[np.bool_]
    """[T]: True for targets; at least one, never the first."""
    place: str
    """File and row, for errors."""
    num_prompt: int | None = None
    """Prompt tokens that a generated completion continues; None: all tokens before the first target."""
    teacher: str = ""
    """Name of the row's teacher; empty if rows name none."""
    aligned: AlignedText | None = None
    """The text in the tokens of a teacher with another tokenizer; None if both tokenizers agree."""
    teacher_prompts: Mapping[str, TeacherPrompt] = field(default_factory=dict)
    """Prompts that teachers see alone, by their names; no part of `token_ids`."""
    token_type_ids: NDArray[np.int32] | None = None
    """[T]: segment of each token of a classifier's pair of texts; None for a single text."""

    @property
    def teacher_tokens(self) -> tuple[NDArray[np.int32], int]:
        """Token ids and first position of the teacher query."""
        if self.aligned is not None:
            return self.aligned.token_ids, self.aligned.start
        return self.token_ids, self.start

    @property
    def start(self) -> int:
        """Index of the first target, >= 1: the first queried position."""
        return int(np.argmax(self.mask))

    @property
    def prompt(self) -> NDArray[np.int32]:
        """Token ids that a generated completion continues, at least one."""
        return self.token_ids[: self.start if self.num_prompt is None else self.num_prompt]

    def prompt_for(self, teacher: str) -> NDArray[np.int32]:
        """Returns the tokens that `teacher`, by its name, continues in the place of `prompt`."""
        own = prompt_of(self.teacher_prompts, teacher)
        return self.prompt if own is None else own.before(self.prompt)

    @property
    def num_targets(self) -> int:
        """Number of tokens trained on."""
        return int(self.mask.sum())


def num_prompt_tokens(completion_mask: Sequence[bool] | NDArray[np.bool_]) -> int:
    """Returns the start of a row's last completion, >= 1."""
    completion_mask = np.asarray(completion_mask, np.bool_)
    begins = np.flatnonzero(completion_mask[1:] & ~completion_mask[:-1])
    return int(begins[-1]) + 1 if len(begins) else 1


class EncodedRow(NamedTuple):
    """Tokens of one row, not truncated."""

    row: DatasetRow
    token_ids: list[int]
    completion_mask: NDArray[np.bool_]
    """True for the tokens of completions."""


class _Draft(NamedTuple):
    """A row's text before it is tokenized."""

    row: DatasetRow
    request: TextRequest
    spans: Sequence[Span] | None
    """Characters of its completions; None: all."""
    end_id: int | None
    """Token that is put behind the text."""


class RowEncoder:
    """Encodes rows with one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        completion_only: bool,
        ends_text: bool = True,
        today: date | None = None,
        chat: bool = False,
        extra_fields: ExtraFields = "keep",
        own_fields: Collection[str] = (),
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Without `ends_text` rows of plain text have no end token; `today` is the date that chat templates are told.

        `chat`, `extra_fields`, `own_fields`, `tools` and `options` are those of `parse_training_row`.

        Raises StillhouseError(TOKENIZER_INVALID) unless `tokenizer` is a fast tokenizer of transformers.
        """
        if not tokenizer.is_fast:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The student's tokenizer {type(tokenizer).__name__} has no tokenizer.json, which exact masks need. "
                "Convert it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...).",
            )
        self._tokenizer = tokenizer
        self._completion_only = completion_only
        self._ends_text = ends_text
        self._parse = partial(
            DatasetRow.parse,
            chat=chat,
            extra_fields=extra_fields,
            own_fields=own_fields,
            completion_only=completion_only,
            tools=tools,
            options=options,
        )
        self._encoder = TextEncoder(tokenizer)
        self._marks = SpecialMarks(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._chat = ChatMasker(tokenizer, self._marks, today=today)
        self._end_ids: set[int] = set()

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Any, *, own_fields: Collection[str] = ()) -> RowEncoder:
        """Returns the encoder of a run's rows; `own_fields` are read for something else than the rows' text. Raises StillhouseError(TOKENIZER_INVALID)."""
        return cls(
            tokenizer,
            completion_only=data.completion_only,
            chat=data.chat,
            extra_fields="refuse" if data.extra_fields == "refuse" else "keep",
            own_fields={*own_fields, *([data.teacher_field] if data.teacher_field else ())},
            ends_text=data.end_text,
            # Runs of earlier versions have none: their templates are told the day of the attempt.
            today=date.fromisoformat(data.date) if data.date else None,
            tools=parse_tools(data.tools),
            options=parse_options(data.chat_template_kwargs),
        )

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""
        tokenizer = self._tokenizer
        return tokenizer_fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)

    @property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return self._chat.template

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder of texts."""
        return self._encoder

    def parse(self, row: DatasetRow) -> TrainingRow:
        """Returns the content of a row. Raises StillhouseError(DATASET_INVALID)."""
        return self._parse(row)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that ended a text or a turn so far, ascending."""
        return tuple(sorted(self._end_ids | self._chat.end_ids))

    @property
    def wrote_date(self) -> bool:
        """True if a chat template asked for the date so far."""
        return self._chat.template.asked_date

    def see_end(self, token_ids: Sequence[int]) -> None:
        """Counts the last token of a text that was encoded elsewhere among the ends if it is a special one."""
        if self._marks.holds(int(token_ids[-1])):
            self._end_ids.add(int(token_ids[-1]))

    @property
    def notes(self) -> Mapping[str, int]:
        """Counts of what the user should know about the rows so far, by name, none of them 0."""
        counts: dict[str, int] = {name: count for name, count in self._chat.notes.items() if count}
        doubled = self._encoder.num_doubled_openings
        return counts | ({"doubled_openings": doubled} if doubled else {})

    @property
    def learned(self) -> Learned:
        """Knowledge from the rows so far about the chat template; the encoding of later rows depends on it and on nothing else."""
        return self._chat.learned

    @learned.setter
    def learned(self, told: Learned) -> None:
        self._chat.learned = told

    def forget_counts(self) -> None:
        """Begins anew with `end_ids`, `wrote_date` and `notes`."""
        self._end_ids.clear()
        self._chat.end_ids.clear()
        self._chat.notes.clear()
        self._chat.template.asked_date = False
        self._encoder.num_doubled_openings = 0

    def encode(self, row: DatasetRow) -> tuple[list[int], list[bool]]:
        """Returns token ids and target mask of a row, not truncated. Raises StillhouseError(DATASET_INVALID)."""
        (encoded,) = self.encode_rows([row])
        return encoded.token_ids, [bool(each) for each in self.target_mask(encoded.completion_mask)]

    def target_mask(self, completion_mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Turns a completion mask into the mask of targets."""
        trained = completion_mask.copy() if self._completion_only else np.ones_like(completion_mask)
        trained[:1] = False
        return trained

    def encode_rows(self, rows: Sequence[DatasetRow]) -> Iterator[EncodedRow]:
        """Yields the tokens of rows, which are tokenized in one call, each as it would be alone.

        Raises StillhouseError(DATASET_INVALID) for the first bad row, behind the rows before it.
        """
        drafts: list[_Draft] = []
        refused: StillhouseError | None = None
        for row in rows:
            try:
                drafts.append(self._draft(row))
            except StillhouseError as error:
                refused = error
                break
        texts = self._encoder.encode_all([each.request for each in drafts])
        for draft, text in zip(drafts, texts, strict=True):
            ids = text.token_ids
            mask = np.ones(len(ids), np.bool_) if draft.spans is None else text.mask(draft.spans)
            if draft.end_id is not None:
                ids, mask = [*ids, draft.end_id], np.append(mask, True)
            yield EncodedRow(draft.row, ids, mask)
        if refused is not None:
            raise refused

    def _draft(self, row: DatasetRow) -> _Draft:
        content, is_cut = self._parse(row), is_cut_short(row.values.get("finish_reason"))
        if content.turns is not None:
            conversation = self._chat.template.conversation(row, content.turns)
            text, spans = self._chat.render(conversation, is_cut=is_cut)
            return _Draft(row, TextRequest(text, False, [begin for begin, _ in spans]), spans, None)
        if content.kind == "completion":
            return self._draft_plain(row, content.prompt, content.completion, ends=not is_cut)
        return self._draft_plain(row, "", content.text, ends=self._ends_text and not is_cut)

    def _draft_plain(self, row: DatasetRow, prompt: str, text: str, *, ends: bool) -> _Draft:
        """Drafts the prompt as at inference and `text` as its continuation; with `ends` its end token follows."""
        end_id = None
        # Text that closes its turn itself has its end; white space behind it is written by a template, not by a model.
        mark = self._marks.at_end(text.rstrip())
        begin, whole = len(prompt), prompt + (text.rstrip() if mark else text)
        if mark:
            self._end_ids.add(self._marks.token_id(mark))
        elif ends and self._eos is not None and self._marks.holds(self._eos):
            end_id = self._eos
            self._end_ids.add(end_id)
        spans = [(begin, len(whole))] if prompt else None
        return _Draft(row, TextRequest(whole, True, [begin]), spans, end_id)
