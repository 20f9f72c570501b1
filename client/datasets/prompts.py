"""Exports the prompts of training rows for batch inference: the context of each row, without its completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import usage_error
from stillhouse.client.datasets.row_files import json_line, no_rows, rows_of, whole_files
from stillhouse.client.datasets.row_text import RowParts, parts_of
from stillhouse.protos.rows.field_error import FieldError, kind_of
from stillhouse.protos.rows.reading.row_error import row_error

COMPAT_SUFFIXES = ("_prompts_base.jsonl", "_prompts_grpo.jsonl")
"""Ends of the two equal files that the GRPO recipe names."""


def export_prompts(
    source: Path, outputs: Sequence[Path], *, chat: bool = False, plain_rows: bool = False
) -> int:
    """Writes the prompts of `source` to each of `outputs`, and returns their number.

    A row has `id` and `prompt`, with `system` if there is one; conversations without a system's turn, or of several turns,
    are `messages`. With `plain_rows` every row is `id`, `system` and `prompt`, and others are refused. `chat` makes a user's
    turn of prompts of text. Raises StillhouseError naming the row; then nothing is written.
    """
    if not outputs:
        raise usage_error("there is no output. Give at least one.")
    count = 0
    with whole_files(outputs, inputs=[source]) as files:
        for line in _prompts(source, chat=chat, plain_rows=plain_rows):
            for file in files:
                file.write(line)
            count += 1
        if not count:
            raise no_rows(source)
    return count


def _prompts(source: Path, *, chat: bool, plain_rows: bool) -> Iterator[bytes]:
    seen: dict[str | int, int] = {}
    for number, values in rows_of(source):
        try:
            name = _id(values, number, seen)
            parts = parts_of(values, chat=chat)
            yield json_line({"id": name, **(_plain(parts) if plain_rows else _any(parts))})
        except FieldError as error:
            raise row_error(source, number, error.field, error.problem) from error


def _id(values: Mapping[str, Any], number: int, seen: dict[str | int, int]) -> str | int:
    """Returns the row's id, or its number if it has none, and adds it to those that were seen. Raises FieldError."""
    name = values.get("id")
    if name is None:
        name = number
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise FieldError(
            "id", f"is {kind_of(name)}, where text or a whole number is needed. Write it as a string."
        )
    first = seen.setdefault(name, number)
    if first != number:
        raise FieldError("id", f"is {name!r}, as that of row {first}. Give each row an id of its own.")
    return name


def _any(parts: RowParts) -> Mapping[str, Any]:
    if parts.messages is None:
        if not parts.prompt:
            raise FieldError("text", "has no prompt. Give rows with prompt or messages.")
        return {"prompt": parts.prompt}
    _require_question(parts)
    system = _system_and_prompt(parts)
    # Without a system's turn, a prompt of text is continued as it is.
    if system:
        return {"system": system, "prompt": parts.prompt, **parts.context}
    return {"messages": list(parts.messages), **parts.context}


def _plain(parts: RowParts) -> Mapping[str, Any]:
    if parts.context:
        raise FieldError(
            next(iter(parts.context)), "has no place beside id, system and prompt. Leave --compat out."
        )
    if parts.messages is None:
        return {"system": "", **_any(parts)}
    _require_question(parts)
    system = _system_and_prompt(parts)
    if system is None:
        raise FieldError(
            "messages", "has more turns than one of the system and one of a user. Leave --compat out."
        )
    return {"system": system, "prompt": parts.prompt}


def _require_question(parts: RowParts) -> None:
    if not parts.messages or parts.messages[-1]["role"] not in ("user", "tool"):
        raise FieldError("messages", "have no turn of a user to answer. Add one.")


def _system_and_prompt(parts: RowParts) -> str | None:
    """Returns the system's text, or nothing if there is none; None for a conversation that is more than that and a prompt."""
    turns = list(parts.messages or ())
    if any(each.keys() != {"role", "content"} for each in turns):
        return None
    roles = [each["role"] for each in turns]
    if roles == ["user"]:
        return ""
    return str(turns[0]["content"]) if roles == ["system", "user"] else None
