"""The meaning of a training row's fields: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from stillhouse.protos.rows.conversation import (
    OPTIONS,
    REASONING,
    Turns,
    parse_options,
    parse_tools,
    parse_turns,
    with_system,
)
from stillhouse.protos.rows.field_error import FieldError, kind_of, require_unicode, shown
from stillhouse.protos.rows.known_fields import (
    CONTEXT,
    LABELS,
    NO_EFFECT_ON_SAMPLING,
    NO_EFFECT_ON_TEXT,
    SETTINGS,
    TRAINING,
    ExtraFields,
    check_fields,
    unknown,
)

Kind = Literal["messages", "completion", "text"]

_KNOWN = {*TRAINING, *SETTINGS, *LABELS, *NO_EFFECT_ON_SAMPLING}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRow:
    """A row's content, checked; the fields of its kind are set."""

    kind: Kind
    turns: Turns | None = None
    """Conversation of "messages"."""
    prompt: str = ""
    """Text before the completion."""
    completion: str = ""
    """Text to learn after the prompt."""
    text: str = ""
    """Text to learn as a whole."""


def parse_training_row(
    values: Mapping[str, Any],
    *,
    chat: bool = False,
    extra_fields: ExtraFields = "keep",
    own_fields: Collection[str] = (),
    completion_only: bool = True,
    tools: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
) -> TrainingRow:
    """Parses a row; `chat` makes turns of prompts and completions of text, and `own_fields` are known besides.

    `tools` and `options` are those of conversations that have none; an option of the row itself takes precedence. Without
    `completion_only` a run trains on every token. Raises FieldError, for the first field that is not usable.
    """
    row = _content(_with_defaults(values, tools, options) if tools or options else values, chat=chat)
    check_fields(values, known=_KNOWN | {*own_fields}, no_effect=NO_EFFECT_ON_TEXT, extra=extra_fields)
    if row.turns is not None and row.turns.extra and extra_fields == "refuse":
        raise unknown(row.turns.extra[0])
    if row.turns is not None and row.turns.has_weight_0 and not completion_only:
        raise FieldError(
            "messages",
            "has a turn of weight 0, but data.completion_only is false, which trains on every token. Remove one of them.",
        )
    return row


def _with_defaults(
    values: Mapping[str, Any], tools: Sequence[Any], options: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Returns a row with the tools and options of its run, unless it is text, which has none."""
    if kind_of_row(values) == "text":
        return values
    own = values.get("tools")
    return {
        **values,
        "tools": list(tools) if own is None else own,
        OPTIONS: {**(options or {}), **parse_options(values.get(OPTIONS))},
    }


def kind_of_row(values: Mapping[str, Any]) -> Kind:
    """Returns the fields that decide on a row, in order of precedence. Raises FieldError if it has none of them."""
    present = {name for name, value in values.items() if value is not None}
    if "messages" in present:
        return "messages"
    if present >= {"prompt", "completion"}:
        return "completion"
    if "text" in present:
        return "text"
    if present & {"prompt", "completion"}:
        missing = "completion" if "prompt" in present else "prompt"
        raise FieldError(missing, "is missing; a row with the one needs the other.")
    found = ", ".join(sorted(map(str, present))) or "nothing"
    raise FieldError(
        "text", f"is missing: a row needs messages, or prompt and completion, or text; it has {found}."
    )


def _content(values: Mapping[str, Any], *, chat: bool) -> TrainingRow:
    kind = kind_of_row(values)
    if kind == "text":
        if name := context_of(values):
            raise FieldError(name, "has no effect on a row of text. Give messages, or prompt and completion.")
        text = _text(values, "text")
        if not text:
            raise FieldError("text", "is empty; remove the row or fill it.")
        for name in ("prompt", "completion"):
            part = values.get(name)
            if part is not None and not (isinstance(part, str) and part in text):
                other = "completion" if name == "prompt" else "prompt"
                raise FieldError(
                    name,
                    f"is given beside text and is no part of it, so it would not be read. Remove it, or give {other} in the "
                    "place of text.",
                )
        return TrainingRow(kind=kind, text=text)
    if kind == "messages":
        _check_copies(values)
        messages = values["messages"]
        return TrainingRow(kind=kind, turns=_turns(values, messages, trained_from=0))
    prompt, completion = values["prompt"], values["completion"]
    is_chat = chat or any(isinstance(each, list) for each in (prompt, completion))
    if not (is_chat or context_of(values)):
        row = TrainingRow(kind=kind, prompt=_text(values, "prompt"), completion=_text(values, "completion"))
        if not row.completion and not values.get("finish_reason"):
            raise FieldError(
                "completion", "is empty, so there is nothing to learn. Remove the row or fill it."
            )
        return row
    before = as_messages(values, "prompt", "user")
    messages = [*before, *as_messages(values, "completion", "assistant")]
    return TrainingRow(kind="messages", turns=_turns(values, messages, trained_from=len(before)))


def as_messages(values: Mapping[str, Any], field: str, role: str) -> list[Any]:
    """Returns messages of a field that holds a list of them, or the text of one turn of `role`. Raises FieldError."""
    value = values[field]
    if isinstance(value, list):
        parse_turns(value, name=field)
        return value
    return [{"role": role, "content": _text(values, field)}]


def context_of(values: Mapping[str, Any]) -> str:
    """Returns the name of a field that only conversations have, or nothing if all are empty. Raises FieldError."""
    given = {
        "system": values.get("system"),
        "tools": parse_tools(values.get("tools")),
        OPTIONS: parse_options(values.get(OPTIONS)),
    }
    return next((name for name in CONTEXT if given[name]), "")


def _turns(values: Mapping[str, Any], messages: Any, *, trained_from: int) -> Turns:
    if values.get("system"):
        before = len(parse_turns(messages).messages)
        messages = with_system(messages, values["system"])
        trained_from += (len(messages) - before) if trained_from else 0
    turns = parse_turns(messages, values.get("tools"), values.get(OPTIONS))
    if not any(message["role"] == "assistant" for message in turns.messages[trained_from:]):
        roles = sorted({str(message["role"]) for message in turns.messages[trained_from:]})
        raise FieldError(
            "messages",
            f'has no turn with role "assistant", so there is nothing to train on; its roles are {", ".join(map(shown, roles))}. Add '
            "the answer, or give its turns this role.",
        )
    trained = tuple(each and at >= trained_from for at, each in enumerate(turns.trained))
    # A teacher may well end a text at once; finish_reason says that one did.
    for at, message in enumerate(turns.messages if not values.get("finish_reason") else ()):
        if trained[at] and not any(message.get(name) for name in ("content", "tool_calls", REASONING[0])):
            raise FieldError(
                f"messages[{at}].content",
                "is empty, so there is nothing to learn. Remove the row, fill it, or give the turn weight 0.",
            )
    return replace(turns, trained=trained)


def _check_copies(values: Mapping[str, Any]) -> None:
    """Raises FieldError if prompt or completion beside messages are not parts of them."""
    messages = values["messages"] if isinstance(values["messages"], list) else []
    for field, role, order in (("prompt", "user", 1), ("completion", "assistant", -1)):
        value = values.get(field)
        if value is None:
            continue
        found = [
            each.get("content")
            for each in messages[::order]
            if isinstance(each, dict) and each.get("role") == role
        ]
        if not isinstance(value, str) or not any(
            isinstance(each, str) and each.strip() == value.strip() for each in found
        ):
            raise FieldError(field, "is given beside messages and is no part of them. Give one of them.")


def _text(values: Mapping[str, Any], field: str) -> str:
    value = values[field]
    if not isinstance(value, str):
        raise FieldError(field, f"is {kind_of(value)}; it must be a string.")
    return require_unicode(value, field)
