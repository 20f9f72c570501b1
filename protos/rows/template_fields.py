"""Brings a conversation to the fields that one chat template reads; a field without a trace in the text is refused.

A template is a program: it is tried, not parsed. The text without a field is compared with the text that has it, once for
each situation of a turn, so that long data costs no more than short.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from stillhouse.protos.rows.conversation import OPTIONS, REASONING, Message, Turns
from stillhouse.protos.rows.field_error import FieldError

Render = Callable[[Sequence[Message], Turns], str]
"""Text of messages, with the tools and the options of a conversation; raises anything that the template raises."""

Changed = tuple[Sequence[Message], Turns]
"""Messages, tools and options with another value of one field."""

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
        self._source = text = str(source)
        self._render = render
        names = [name for name in REASONING if re.search(rf"\b{name}\b", text)]
        self._reads_reasoning = bool(names)
        self._reasoning_name = names[0] if names else REASONING[0]
        self._read: set[object] = set()

    def resolve(self, turns: Turns) -> list[Message]:
        """Returns the messages as the template reads them.

        Raises FieldError for a field that leaves no trace in the text, and what the template raises.
        """
        for name in turns.options:
            # A value may be the template's own default, so that the text tells nothing.
            if not re.search(rf"\b{re.escape(name)}\b", self._source):
                raise FieldError(
                    f"{OPTIONS}.{name}", "is not read by the chat template. Remove it, or correct its name."
                )
        messages = [self._renamed(message) for message in turns.messages]
        if not turns.tools and all(_is_plain(message) for message in turns.messages):
            return messages
        messages, text = self._fitting(messages, turns)
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

    def _fitting(self, messages: list[Message], turns: Turns) -> tuple[list[Message], str]:
        """Returns messages and their text in the form that the template takes and writes as it is meant.

        Missing content is null, or else empty; arguments are an object, or else JSON text. Jinja prints null as "None" and
        an object in Python's way. Raises what the template raises if it takes no form.
        """
        best: tuple[int, list[Message], str] | None = None
        refusal: Exception | None = None
        for form in _forms(messages):
            try:
                text = self._render(form, turns)
            except Exception as error:
                refusal = refusal or error
                continue
            num_spoilt = sum(text.count(each) for each in _spoilt(messages))
            if best is None or num_spoilt < best[0]:
                best = num_spoilt, form, text
            if num_spoilt == 0:
                break
        if best is None:
            raise refusal or AssertionError
        return best[1], best[2]

    def _trials(self, messages: Sequence[Message], turns: Turns) -> Iterator[_Trial]:
        """Yields a trial for each field that has to leave a trace."""
        shapes = [_shape(message) for message in messages]
        if turns.tools:
            yield _Trial(
                "tools", ("tools", shapes[0], shapes[-1]), lambda: (messages, replace(turns, tools=()))
            )
        last_user, last_own = (_last(messages, role) for role in ("user", "assistant"))
        for at, message in enumerate(messages):
            around = shapes[max(0, at - 1) : at + 2]
            situation = (*around, at == 0, at > last_user, bool(turns.tools))
            for field, kind, change in self._changes(message, is_history=at < max(last_user, last_own)):

                def changed(at: int = at, change: Callable[[], Message] = change) -> Changed:
                    return [*messages[:at], change(), *messages[at + 1 :]], turns

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
            arguments = call["function"]["arguments"]
            if arguments not in ({}, "{}"):
                other: object = "{}" if isinstance(arguments, str) else {}
                bare = {**call, "function": {**call["function"], "arguments": other}}
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

    def _has_trace(self, messages: Sequence[Message], turns: Turns, text: str) -> bool:
        try:
            return self._render(messages, turns) != text
        except Exception:
            return True  # the template reads what it misses


def _last(messages: Sequence[Message], role: str) -> int:
    """Returns the index of the last message of a role, or -1."""
    return max((at for at, each in enumerate(messages) if each["role"] == role), default=-1)


def _is_plain(message: Message) -> bool:
    return message.keys() == {"role", "content"} and message["role"] in ("user", "assistant")


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yields the messages, then with empty content where it is missing, with arguments as text, and with both."""
    has_null = any(message["content"] is None for message in messages)
    has_calls = any(message.get("tool_calls") for message in messages)
    filled = [
        message if message["content"] is not None else {**message, "content": ""} for message in messages
    ]
    for form in (messages, filled) if has_null else (messages,):
        yield form
    for form in ((messages, filled) if has_null else (messages,)) if has_calls else ():
        yield [_with_text_arguments(message) for message in form]


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _spoilt(messages: Sequence[Message]) -> list[str]:
    """Lists the texts that a template writes if it prints a value that it should have written as JSON, or left out."""
    printed = [
        str(call["function"]["arguments"])
        for message in messages
        for call in message.get("tool_calls", ())
        if call["function"]["arguments"]
    ]
    return [*printed, *(["None"] if any(message["content"] is None for message in messages) else [])]


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
