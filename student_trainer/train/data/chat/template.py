"""Renders conversations with a tokenizer's chat template; a template's own failure names the row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.student_trainer.train.data.readers import DatasetRow

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Checked turns of one row, with all that their chat template is given."""

    row: DatasetRow
    """Source of the turns, for errors."""
    messages: Sequence[Mapping[str, Any]]

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

    def render(self, conversation: Conversation, **options: Any) -> Any:
        """Renders a conversation; `options` are those of `apply_chat_template`. Raises StillhouseError(DATASET_INVALID)."""
        row = conversation.row
        if not self._tokenizer.chat_template:
            raise row.invalid(
                "messages",
                "needs a chat template, which the student's tokenizer lacks; give prompt and completion.",
            )
        # The template is Jinja code of the model's author and may raise anything about roles and their order.
        try:
            return self._tokenizer.apply_chat_template(list(conversation.messages), **options)
        except Exception as error:
            raise row.invalid("messages", f"is refused by the student's chat template: {error}") from error
