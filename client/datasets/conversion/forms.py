"""One row in the forms of other formats: a conversation, or a pair of two texts and what else the row says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.protos.rows.conversation import parse_turns, with_system
from stillhouse.protos.rows.field_error import FieldError, kind_of, require_text
from stillhouse.protos.rows.reading.strict_json import why_not_json
from stillhouse.protos.rows.row_forms import known_fields
from stillhouse.protos.rows.training_row import context_of, kind_of_row

Values = Mapping[str, Any]
CONTENT = ("messages", "prompt", "completion", "system")
SEPARATOR = "\n\n"
"""Stands between the system's text and the user's in a source."""
OPENAI_FIELDS = ("messages", "tools", "parallel_tool_calls", "functions")
OPENAI_MESSAGE = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "weight", "refusal", "function_call", "audio"}
)
_TEXT_TURN = {"role", "content"}


def to_messages(values: Values, *, chat: bool) -> dict[str, Any]:
    """Returns a row as a conversation, with its other fields.

    Raises FieldError for plain text, unless `chat` makes turns of prompt and completion.
    """
    values = known_fields(values)
    kind = kind_of_row(values)
    if kind == "text":
        raise FieldError("text", "is no conversation. Give messages, or prompt and completion.")
    rest = {name: value for name, value in values.items() if name not in CONTENT}
    if kind == "messages":
        _check_turns(values["messages"], "messages")
        messages = list(values["messages"])
    else:
        before, after = values["prompt"], values["completion"]
        if isinstance(before, str) and isinstance(after, str) and not (chat or context_of(values)):
            raise FieldError(
                "prompt", "is plain text, which a chat template would change. Ask for turns with --chat."
            )
        messages = [*_turns(before, "prompt", "user"), *_turns(after, "completion", "assistant")]
    if values.get("system"):
        messages = with_system(messages, values["system"])
    return {"messages": messages, **rest}


def _turns(value: Any, field: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        _check_turns(value, field)
        # A prompt's own answers are context, which is not learnt.
        return [
            {**each, "weight": 0} if role == "user" and each.get("role") == "assistant" else dict(each)
            for each in value
        ]
    return [{"role": role, "content": require_text(value, field)}]


def _check_turns(value: Any, field: str) -> None:
    """Checks messages, but for halves of surrogate pairs: no model takes them, and no conversion has to change them."""
    try:
        parse_turns(value, name=field)
    except FieldError as error:
        if not isinstance(error.__cause__, UnicodeEncodeError):
            raise


def to_openai(values: Values, *, chat: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a row of OpenAI's fine-tuning format, and the fields that have no place in it. Raises FieldError."""
    row = to_messages(values, chat=chat)
    for index, message in enumerate(row["messages"]):
        foreign = next(
            (name for name, value in message.items() if name not in OPENAI_MESSAGE and value is not None),
            None,
        )
        if foreign is not None:
            raise FieldError(
                f"messages[{index}].{foreign}",
                "has no place in OpenAI's format. Convert to messages instead.",
            )
    row["messages"] = [_with_text_arguments(each) for each in row["messages"]]
    if isinstance(row.get("tools"), str):
        try:
            row["tools"] = json.loads(row["tools"])
        except (ValueError, RecursionError) as error:
            raise FieldError("tools", why_not_json(error, "write JSON, or the value itself")) from error
    known = {name: row[name] for name in OPENAI_FIELDS if row.get(name) is not None}
    return known, {name: value for name, value in row.items() if name not in known}


def _with_text_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = []
    for call in calls:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        written.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": written}


def to_pair(values: Values) -> tuple[str, str, dict[str, Any]]:
    """Returns source, target, and what else the row says, from which `from_pair` makes the row again.

    The source is the system's text, an empty line and the user's. Raises FieldError for a row that is more than these texts.
    """
    values = known_fields(values)
    kind = kind_of_row(values)
    if kind == "text":
        raise FieldError("text", "has no prompt to be the source. Give messages, or prompt and completion.")
    rest: dict[str, Any] = {name: value for name, value in values.items() if name not in CONTENT}
    record: dict[str, Any] = {"fields": rest}
    if kind == "messages":
        if values.get("system") or values.get("prompt") or values.get("completion"):
            raise FieldError("messages", "stand beside a system, prompt or completion. Give one of them.")
        system, prompt, target = _plain_turns(values["messages"])
        record["form"] = "messages"
    else:
        given = values.get("system")
        system = None if given is None else require_text(given, "system")
        prompt, target = (
            require_text(values["prompt"], "prompt"),
            require_text(values["completion"], "completion"),
        )
        record["form"] = "prompt"
    if system is None:
        return prompt, target, record
    record["system_chars"] = len(system)
    return f"{system}{SEPARATOR}{prompt}", target, record


def from_pair(source: str, target: str, record: Values) -> dict[str, Any]:
    """Makes the row of a pair again. Raises FieldError if the record is not one of `to_pair`."""
    fields, form, length = record.get("fields"), record.get("form"), record.get("system_chars")
    if not isinstance(fields, dict) or form not in ("messages", "prompt"):
        raise FieldError("form", "is not what a conversion writes. Convert the rows again.")
    system: str | None = None
    if length is not None:
        if type(length) is not int or source[length : length + len(SEPARATOR)] != SEPARATOR:
            raise FieldError(
                "system_chars", "is not the length of the system's text. Convert the rows again."
            )
        system, source = source[:length], source[length + len(SEPARATOR) :]
    if form == "prompt":
        before = {} if system is None else {"system": system}
        return {**before, "prompt": source, "completion": target, **fields}
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": source}, {"role": "assistant", "content": target}]
    return {"messages": messages, **fields}


def _plain_turns(messages: Any) -> tuple[str | None, str, str]:
    """Returns the texts of the system, if there is a turn of it, of the user and of the assistant."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise FieldError("messages", f"are {kind_of(messages)}; they must be a list of objects.")
    roles = [each.get("role") for each in messages]
    is_plain = all(each.keys() == _TEXT_TURN and isinstance(each["content"], str) for each in messages)
    if not is_plain or roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise FieldError(
            "messages",
            "are more than a system's text, a user's and an assistant's, which are all that a pair of lines can hold. Convert "
            "to messages instead.",
        )
    texts: Sequence[str] = [each["content"] for each in messages]
    return (texts[0] if len(texts) == 3 else None), texts[-2], texts[-1]
