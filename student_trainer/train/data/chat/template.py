"""Renders conversations with a tokenizer's chat template; a template's own failure names the row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.conversation import Turns
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.template_fields import TemplateFields
from stillhouse.student_trainer.train.data.readers import DatasetRow

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Checked turns of one row, with all that their chat template is given."""

    row: DatasetRow
    """Source of the turns, for errors."""
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    """Tools that the assistant may call."""
    trained: Sequence[bool] = ()
    """For each message True if it is a turn of the assistant to learn; the others have weight 0, or are a prompt's."""

    def first(self, num_messages: int) -> Conversation:
        """Returns the conversation of the first `num_messages` turns."""
        return replace(self, messages=self.messages[:num_messages])


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast tokenizer of transformers, with or without a template."""
        self._tokenizer = tokenizer
        self.marks_generation = bool(_GENERATION_BLOCK.search(tokenizer.chat_template or ""))
        """True if the template marks the assistant's text with {% generation %} blocks."""
        self._fields = TemplateFields(tokenizer.chat_template, self._text)

    def conversation(self, row: DatasetRow, turns: Turns) -> Conversation:
        """Returns the turns of a row as the template reads them.

        Raises StillhouseError(DATASET_INVALID), also for a field that the template leaves out.
        """
        self._require(row)
        try:
            messages = self._fields.resolve(turns)
        except FieldError as error:
            raise row.invalid(error.field, error.problem) from error
        except Exception as error:
            raise _refused(row, error) from error
        return Conversation(row=row, messages=messages, tools=turns.tools, trained=turns.trained)

    def render(self, conversation: Conversation, **options: Any) -> Any:
        """Renders a conversation; `options` are those of `apply_chat_template`. Raises StillhouseError(DATASET_INVALID)."""
        self._require(conversation.row)
        try:
            return self._apply(conversation.messages, conversation.tools, **options)
        except Exception as error:
            raise _refused(conversation.row, error) from error

    def _require(self, row: DatasetRow) -> None:
        if not self._tokenizer.chat_template:
            raise row.invalid(
                "messages",
                "needs a chat template, which the student's tokenizer lacks; give prompt and completion.",
            )

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        return str(self._apply(messages, tools, tokenize=False))

    def _apply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], **options: Any
    ) -> Any:
        return self._tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, **options)


def _refused(row: DatasetRow, error: Exception) -> StillhouseError:
    """Returns the error of a template, which is Jinja code of the model's author and may raise anything about roles."""
    return row.invalid("messages", f"is refused by the student's chat template: {error}")
