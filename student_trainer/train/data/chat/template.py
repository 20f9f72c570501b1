"""Renders conversations with a tokenizer's chat template; a template's own failure names the row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError

from stillhouse.protos.errors import StillhouseError, first_line
from stillhouse.protos.rows.chat_template import ContentForm, select_template
from stillhouse.protos.rows.conversation import Turns
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.template_fields import TemplateFields
from stillhouse.protos.tokenizers.bounded_rendering import (
    bounded_rendering,
    checked_length,
    checked_template,
)
from stillhouse.protos.tokenizers.bounded_templates import bound_library
from stillhouse.student_trainer.train.data.readers import DatasetRow

_NO_LOADER = "no loader"
"""Part of Jinja's error for a template that includes another file."""
_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Checked turns of one row, with all that their chat template is given."""

    row: DatasetRow
    """Source of the turns, for errors."""
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    """Tools that the assistant may call."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template."""
    trained: Sequence[bool] = ()
    """For each message True if it is a turn of the assistant to learn; the others have weight 0, or are a prompt's."""

    def first(self, num_messages: int) -> Conversation:
        """Returns the conversation of the first `num_messages` turns."""
        return replace(self, messages=self.messages[:num_messages])


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str
    spans: Sequence[tuple[int, int]] = ()
    """Characters [begin, stop) inside {% generation %} blocks, in order."""


class ChatTemplate:
    """The chat template of one tokenizer, or its several named ones."""

    def __init__(self, tokenizer: Any, *, today: date | None = None) -> None:
        """`tokenizer` is a fast tokenizer of transformers; templates that ask for the date are told `today`."""
        self._template = tokenizer.chat_template
        self._names: dict[str, Any] = {**tokenizer.special_tokens_map}
        self._forms: dict[str, ContentForm] = {}
        self.asked_date = False
        """A template asked for the date so far."""
        if today is not None:
            self._today = today
            self._names["strftime_now"] = self._tell_date
        self._fields = TemplateFields(
            self._template, lambda messages, turns: self._apply(messages, turns.tools, turns.options).text
        )

    def _tell_date(self, form: str) -> str:
        self.asked_date = True
        return self._today.strftime(form)

    def conversation(self, row: DatasetRow, turns: Turns) -> Conversation:
        """Returns the turns of a row as the template reads them.

        Raises StillhouseError(DATASET_INVALID), also for a field that the template leaves out.
        """
        try:
            self.source(turns.tools)
            messages = self._fields.resolve(turns)
        except FieldError as error:
            raise row.invalid(error.field, error.problem) from error
        except Exception as error:
            raise _refused(row, error) from error
        return Conversation(
            row=row, messages=messages, tools=turns.tools, options=turns.options, trained=turns.trained
        )

    def source(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Returns the source of the template for a row with `tools`. Raises FieldError if none fits."""
        return select_template(self._template, tools)

    def marks_generation(self, conversation: Conversation) -> bool:
        """Returns True if the template marks the assistant's text with {% generation %} blocks."""
        return bool(_GENERATION_BLOCK.search(self.source(conversation.tools)))

    def render(
        self, conversation: Conversation, *, generation_prompt: bool = False, marks: bool = False
    ) -> Rendered:
        """Renders a conversation, with `marks` also the spans of its blocks. Raises StillhouseError(DATASET_INVALID)."""
        try:
            return self._apply(
                conversation.messages,
                conversation.tools,
                conversation.options,
                generation_prompt=generation_prompt,
                marks=marks,
            )
        except FieldError as error:
            raise conversation.row.invalid(error.field, error.problem) from error
        except Exception as error:
            raise _refused(conversation.row, error) from error

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> Rendered:
        source = self.source(tools)
        form = self._forms.setdefault(source, ContentForm(lambda tried: self._run(source, tried).text))
        return self._run(
            source, form.apply(messages), tools, options, generation_prompt=generation_prompt, marks=marks
        )

    def _run(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> Rendered:
        from transformers.utils import chat_template_utils

        checked_template(source)
        bound_library(chat_template_utils)
        with bounded_rendering():
            texts, spans = chat_template_utils.render_jinja_template(
                [[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=source,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marks,
                **{**self._names, **(options or {})},
            )
        return Rendered(checked_length(texts[0]), spans[0] if marks else ())


def _refused(row: DatasetRow, error: Exception) -> StillhouseError:
    """Returns the error of a template, which is Jinja code of the model's author and may raise anything about roles."""
    problem = first_line(error).rstrip(".")
    if isinstance(error, TemplateSyntaxError) or _NO_LOADER in problem:
        return row.invalid(
            "messages",
            f"cannot be rendered, since the student's chat template is broken ({problem}). Give another one in "
            "data.chat_template.",
        )
    return row.invalid(
        "messages",
        f"is refused by the student's chat template: {problem}. Change the row, or give a template that takes it in "
        "data.chat_template.",
    )
