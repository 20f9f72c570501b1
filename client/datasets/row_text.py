"""The parts of a row that tools look at: its context, and the completion that follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.protos.rows.conversation import OPTIONS, parse_turns, with_system
from stillhouse.protos.rows.field_error import FieldError, require_text
from stillhouse.protos.rows.row_forms import known_fields

Values = Mapping[str, Any]
Message = Mapping[str, Any]
SYSTEM = ("system", "developer")
"""Roles of turns that set the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowParts:
    """A row in parts; `messages` is None for plain text, which no template renders."""

    prompt: str
    """Text before the completion; the last turn of a user in a conversation."""
    messages: tuple[Message, ...] | None
    """Turns before the completion, the system's included."""
    completion: str
    """Text of the assistant's last turn, or after the prompt; empty if there is none."""
    context: Mapping[str, Any]
    """`tools` and `chat_template_kwargs`, as far as the row has them."""

    @property
    def text(self) -> str:
        """All of its text."""
        return self._text(self.messages)

    @property
    def own_text(self) -> str:
        """Its text without that of the system, which many rows share."""
        turns = self.messages or ()
        return self._text(
            None if self.messages is None else [each for each in turns if each["role"] not in SYSTEM]
        )

    def _text(self, messages: Sequence[Message] | None) -> str:
        before = [self.prompt] if messages is None else [text_of(each) for each in messages]
        return "\n".join((*before, self.completion))


def parts_of(values: Values, *, chat: bool = False) -> RowParts:
    """Splits a row of training data in any form, or of prompts. Raises FieldError for a row that is neither."""
    values = known_fields(values)
    context = {name: values[name] for name in ("tools", OPTIONS) if values.get(name)}
    if values.get("messages") is not None:
        before, completion = _split(_turns(values, "messages"))
    elif values.get("prompt") is not None:
        prompt, answer = values["prompt"], values.get("completion")
        is_list = isinstance(prompt, list) or isinstance(answer, list)
        if not (is_list or chat or context or values.get("system")):
            return RowParts(
                prompt=_text(values, "prompt"),
                messages=None,
                completion="" if answer is None else _text(values, "completion"),
                context={},
            )
        before = _turns(values, "prompt") if isinstance(prompt, list) else (_user(values),)
        completion = _answer(values, answer)
    elif values.get("text") is not None:
        return RowParts(prompt="", messages=None, completion=_text(values, "text"), context={})
    else:
        found = ", ".join(sorted(map(str, values))) or "nothing"
        raise FieldError("prompt", f"is missing: a row has messages, prompt or text; this one has {found}.")
    if values.get("system"):
        before = tuple(with_system(list(before), values["system"]))
    users = [text_of(each) for each in before if each["role"] == "user"]
    return RowParts(
        prompt=users[-1] if users else "", messages=before, completion=completion, context=context
    )


def text_of(message: Message) -> str:
    """Returns the text of a checked message; null content is empty."""
    return str(message.get("content") or "")


def _turns(values: Values, field: str) -> tuple[Message, ...]:
    return parse_turns(values[field], name=field).messages


def _user(values: Values) -> Message:
    return {"role": "user", "content": _text(values, "prompt")}


def _answer(values: Values, answer: Any) -> str:
    if answer is None:
        return ""
    if isinstance(answer, list):
        return text_of(_turns(values, "completion")[-1])
    return _text(values, "completion")


def _split(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """Returns the turns before the assistant's last one, and its text, if the conversation ends with it."""
    if messages[-1]["role"] != "assistant":
        return messages, ""
    return messages[:-1], text_of(messages[-1])


def _text(values: Values, field: str) -> str:
    return require_text(values[field], field)
