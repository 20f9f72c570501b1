"""Brings a conversation to the fields that one chat template reads; a field without a trace in the text is refused.

A template is a program: it is tried, not parsed. The text without a field is compared with the text that has it, once for
each situation of a turn, so that long data costs no more than short.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from stillhouse.protos.rows.conversation import REASONING, Message, Turns
from stillhouse.protos.rows.field_error import FieldError

Render = Callable[[Sequence[Message], Sequence[Message]], str]
"""Text of messages and tools; raises anything that the template raises."""

Changed = tuple[Sequence[Message], Sequence[Message]]
"""Messages and tools with another value of one field."""

MAX_SITUATIONS = 4096
"""Situations that are remembered; above it they are forgotten and tried again."""
MAX_TRIALS = 256
"""Renderings for one conversation."""
_ROLES = ("system", "user", "assistant", "tool")


class _Trial(NamedTuple):
    """A field that has to leave a trace."""

    field: str
    situation: object
    """Trials of equal situations have equal results."""
    changed: Callable[[], Changed]


class TemplateFields:
    """Fields that one chat template reads."""

    def __init__(self, source: object, render: Render) -> None:
        """`source` is the template's text, or several by name; `render` applies it."""
        text = str(source)
        self._render = render
        names = [name for name in REASONING if re.search(rf"\b{name}\b", text)]
        self._reads_reasoning = bool(names)
        self._reasoning_name = names[0] if names else REASONING[0]
        self._read: set[object] = set()

    def resolve(self, turns: Turns) -> list[Message]:
        """Returns the messages as the template reads them.

        Raises FieldError for a field that leaves no trace in the text, and what the template raises.
        """
        messages = [self._renamed(message) for message in turns.messages]
        if not turns.tools and all(_is_plain(message) for message in turns.messages):
            return messages
        messages, text = self._with_content(messages, turns.tools)
        num_trials = 0
        for trial in self._trials(messages, turns):
            if trial.situation in self._read:
                continue
            num_trials += 1
            if num_trials > MAX_TRIALS:
                raise FieldError(
                    "messages",
                    f"has more than {MAX_TRIALS} fields in situations of their own. Split the conversation.",
                )
            if not self._has_trace(*trial.changed(), text):
                raise FieldError(
                    trial.field,
                    "leaves no trace in the text: the chat template does not render it. Remove it, or take a model whose "
                    "template does.",
                )
            if len(self._read) >= MAX_SITUATIONS:
                self._read.clear()
            self._read.add(trial.situation)
        return messages

    def _renamed(self, message: Message) -> Message:
        if self._reasoning_name == REASONING[0] or REASONING[0] not in message:
            return message
        rest = {name: value for name, value in message.items() if name != REASONING[0]}
        return {**rest, self._reasoning_name: message[REASONING[0]]}

    def _with_content(self, messages: list[Message], tools: Sequence[Message]) -> tuple[list[Message], str]:
        """Returns messages and their text; missing content is null unless the template would print or refuse it."""
        if all(message["content"] is not None for message in messages):
            return messages, self._render(messages, tools)
        filled = [
            message if message["content"] is not None else {**message, "content": ""} for message in messages
        ]
        try:
            text = self._render(messages, tools)
        except Exception:
            return filled, self._render(filled, tools)
        # Jinja prints null as "None".
        with_empty = self._render(filled, tools) if "None" in text else text
        return (filled, with_empty) if with_empty.count("None") < text.count("None") else (messages, text)

    def _trials(self, messages: Sequence[Message], turns: Turns) -> Iterator[_Trial]:
        """Yields a trial for each field that has to leave a trace."""
        shapes = [_shape(message) for message in messages]
        if turns.tools:
            yield _Trial("tools", ("tools", shapes[0], shapes[-1]), lambda: (messages, ()))
        last_user = max((at for at, each in enumerate(messages) if each["role"] == "user"), default=-1)
        for at, message in enumerate(messages):
            around = shapes[max(0, at - 1) : at + 2]
            situation = (*around, at == 0, at > last_user, bool(turns.tools))
            for field, kind, change in self._changes(message, is_history=at < last_user):

                def changed(at: int = at, change: Callable[[], Message] = change) -> Changed:
                    return [*messages[:at], change(), *messages[at + 1 :]], turns.tools

                yield _Trial(f"messages[{at}].{field}", (kind, situation), changed)

    def _changes(
        self, message: Message, *, is_history: bool
    ) -> Iterator[tuple[str, object, Callable[[], Message]]]:
        """Yields each field of a message that has to leave a trace, its kind, and the message with another value of it."""
        calls = message.get("tool_calls", ())
        if calls:
            yield "tool_calls", "tool_calls", lambda: _without(message, "tool_calls")
        for at, call in enumerate(calls):
            place = (at == 0, at == len(calls) - 1)
            if len(calls) > 1:
                yield f"tool_calls[{at}]", ("call", place), partial(_with_call, message, at)
            if call["function"]["arguments"]:
                bare = {**call, "function": {**call["function"], "arguments": {}}}
                field = f"tool_calls[{at}].function.arguments"
                yield field, ("arguments", place), partial(_with_call, message, at, bare)
        # Templates that know reasoning may leave that of earlier turns out, as their models were trained.
        name = self._reasoning_name
        if name in message and not (is_history and self._reads_reasoning):
            yield REASONING[0], "reasoning", partial(_longer, message, name)
        if message.get("name") and message["role"] != "tool":
            yield "name", "name", partial(_longer, message, "name")
        # That of users, and of assistants that only write, is what every template is for.
        if message["content"] and message["role"] != "user" and (calls or message["role"] != "assistant"):
            yield "content", "content", partial(_longer, message, "content")

    def _has_trace(self, messages: Sequence[Message], tools: Sequence[Message], text: str) -> bool:
        try:
            return self._render(messages, tools) != text
        except Exception:
            return True  # the template reads what it misses


def _is_plain(message: Message) -> bool:
    return message.keys() == {"role", "content"} and message["role"] in ("user", "assistant")


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


def _with_call(message: Message, at: int, *calls: Message) -> Message:
    """Returns a message with `calls` in the place of one."""
    given = message["tool_calls"]
    return {**message, "tool_calls": [*given[:at], *calls, *given[at + 1 :]]}


def _longer(message: Message, name: str) -> Message:
    """Returns a message with more text in a field, at its end, which no template cuts off."""
    return {**message, name: f"{message[name]} x"}


def _shape(message: Message) -> object:
    """Describes the fields that a message has."""
    role = message["role"] if message["role"] in _ROLES else ""
    num_calls = min(2, len(message.get("tool_calls", ())))
    return role, bool(message["content"]), num_calls, tuple(sorted(message))
