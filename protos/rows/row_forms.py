"""Forms of rows that data sets have, each brought to the fields that training and batches know.

The first row decides on the form of a file; a row of another form amid it is refused, since it is mostly a file that was
put together by mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from stillhouse.protos.rows.conversation import parse_json
from stillhouse.protos.rows.field_error import FieldError, kind_of, require_text, shown
from stillhouse.protos.rows.known_fields import LABELS, SETTINGS, TRAINING

RowForm = Literal["messages", "prompt_completion", "text", "alpaca", "sharegpt"]
FORMATS: tuple[str, ...] = ("auto", *get_args(RowForm))
ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of speakers to roles."""
_CALLS = ("function_call", "tool_call")
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "alpaca": ("instruction",),
    "sharegpt": ("conversations",),
}
"""Fields by which a form is known."""
_ALL_FIELDS = sorted(
    {*TRAINING, *LABELS, *SETTINGS, "weight", "label", "text_pair", "conversations", "functions"}
    | {"instruction", "input", "output", "history"}
)
_LEAST_SIMILARITY = 0.82
"""Similarity of a misspelt name to the one that is meant."""
_MAX_NAME_CHARS = 100
"""Compared characters of a name."""
_KNOWN_COLUMNS = 12
"""Columns that an error lists."""


class RowForms:
    """Finds the form of a file's rows and brings each row to the fields that are known."""

    def __init__(self, format: str = "auto", columns: Mapping[str, str] | None = None) -> None:  # noqa: A002
        """`columns` maps fields to their names in the file."""
        self._columns = dict(columns or {})
        self._is_given = format != "auto"
        self.form: RowForm | None = format if self._is_given else None  # type: ignore[assignment]
        """Form of the rows so far."""

    def canonical(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row in known fields. Raises FieldError, also for a row of another form than those before."""
        row = self._renamed(values)
        if self._is_given:
            form: RowForm = self.form  # type: ignore[assignment]
            missing = [name for name in _NEEDS[form] if row.get(name) is None]
            if missing:
                found = form_of(row)
                has = f"it is a row of {found}" if found else f"it has {listed(row)}"
                raise FieldError(
                    missing[0], f"is missing in a row of {form}; {has}. Correct the row, or format."
                )
        else:
            found = form_of(row)
            if found is None:
                raise FieldError(
                    "text",
                    f"is missing: a row needs messages, or prompt and completion, or text; it has {listed(row)}. If other "
                    "names stand for these, name them by columns, as in `columns: {prompt: question, completion: answer}`.",
                )
            if self.form not in (None, found):
                raise FieldError(
                    _NEEDS[found][0],
                    f"makes it a row of {found} amid rows of {self.form}. Put rows of each form into a file of their own.",
                )
            form = self.form = found
        return _TO_KNOWN[form](row)

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if not self._columns:
            return values if isinstance(values, dict) else dict(values)
        for name, column in self._columns.items():
            if column not in values:
                raise FieldError(
                    column, f"is missing, which columns names as {name}; the row has {listed(values)}."
                )
        taken = {*self._columns, *self._columns.values()}
        rest = {name: value for name, value in values.items() if name not in taken}
        return {**{name: values[column] for name, column in self._columns.items()}, **rest}


def form_of(row: Mapping[str, Any]) -> RowForm | None:
    """Returns the form that a row's fields tell; None if it has none of any."""
    if row.get("messages") is not None:
        return "messages"
    has_prompt, has_completion = row.get("prompt") is not None, row.get("completion") is not None
    if has_prompt and has_completion:
        return "prompt_completion"
    if row.get("conversations") is not None:
        return "sharegpt"
    if row.get("instruction") is not None and row.get("output") is not None:
        return "alpaca"
    if row.get("text") is not None:
        return "text"
    if has_prompt or has_completion:
        return "prompt_completion"
    return "alpaca" if row.get("instruction") is not None else None


def known_fields(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a row of any form in known fields, or itself if no form is found. Raises FieldError.

    A row of several forms is what it is in training.
    """
    form = None if row.get("token_ids") is not None else form_of(row)
    return _TO_KNOWN[form](dict(row)) if form else row


def field_meant(name: str) -> str | None:
    """Returns the field of rows for which `name` is a slip of the pen; None for a field, and for a name unlike any."""
    if name in _ALL_FIELDS:
        return None
    near = difflib.get_close_matches(
        name[:_MAX_NAME_CHARS].lower(), _ALL_FIELDS, n=1, cutoff=_LEAST_SIMILARITY
    )
    near = near or [each for each in _ALL_FIELDS if sorted(each) == sorted(name.lower())]
    return near[0] if near else None


def listed(row: Mapping[str, Any]) -> str:
    """Returns the names of the fields that a row has, for errors."""
    names = sorted(str(name) for name, value in row.items() if value is not None)
    more = f" and {len(names) - _KNOWN_COLUMNS} more" if len(names) > _KNOWN_COLUMNS else ""
    return (", ".join(name[:40] for name in names[:_KNOWN_COLUMNS]) or "nothing") + more


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    """Parses messages that a table holds as JSON text, and gives OpenAI's former `functions` their present name."""
    if isinstance(row["messages"], str):
        row = {**row, "messages": parse_json(row["messages"], "messages")}
    functions = row.get("functions")
    if functions and not row.get("tools"):
        if not isinstance(functions, list):
            raise FieldError("functions", f"is {kind_of(functions)}; it must be a list of functions.")
        row = {name: value for name, value in row.items() if name != "functions"}
        row["tools"] = [{"type": "function", "function": each} for each in functions]
    return row


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """Makes a user's turn of instruction and input, and a completion of the output; earlier turns are context."""
    rest = {
        name: value
        for name, value in row.items()
        if name not in ("instruction", "input", "output", "history", "prompt", "completion")
    }
    instruction, given = _text(row, "instruction"), _text(row, "input")
    turns = [
        *_history(row.get("history")),
        {"role": "user", "content": "\n\n".join(filter(None, (instruction, given)))},
    ]
    known = {"prompt": turns, **rest}
    if row.get("output") is not None:
        known["completion"] = _text(row, "output")
    return known


def _history(history: Any) -> list[dict[str, Any]]:
    if not history:
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(each, str) for each in pair)
        for pair in history
    ):
        raise FieldError("history", "must be a list of pairs of text, each a question and its answer.")
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else require_text(value, name)


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """Makes messages of conversations; a turn has `from` and `value`, or the names of messages."""
    turns = row["conversations"]
    if isinstance(turns, str):
        turns = parse_json(turns, "conversations")
    if not isinstance(turns, list) or not turns:
        raise FieldError("conversations", "must be a list of at least one turn.")
    rest = {name: value for name, value in row.items() if name != "conversations"}
    return _messages(
        {"messages": [_turn(turn, f"conversations[{at}]") for at, turn in enumerate(turns)], **rest}
    )


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise FieldError(where, f"is {kind_of(turn)}; it must be an object.")
    if turn.get("from") is None:
        return turn  # messages by another name, which are checked as such
    speaker = turn["from"]
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise FieldError(f"{where}.from", f"is {shown(speaker)}; it must be one of {', '.join(ROLES)}.")
    value = turn.get("value", turn.get("content"))
    rest = {name: each for name, each in turn.items() if name not in ("from", "value", "content")}
    if speaker not in _CALLS:
        return {"role": role, "content": value, **rest}
    if not isinstance(value, str):
        raise FieldError(f"{where}.value", f"is {kind_of(value)}; it must be a call as JSON text.")
    calls = parse_json(value, f"{where}.value")
    return {
        "role": role,
        "content": None,
        "tool_calls": calls if isinstance(calls, list) else [calls],
        **rest,
    }


_TO_KNOWN: Mapping[RowForm, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "messages": _messages,
    "prompt_completion": _same,
    "text": _same,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
