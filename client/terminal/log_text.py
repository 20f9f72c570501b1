"""Formats a run's log, which has one JSON object a line, for a person: time, event and fields; other lines as they are."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from stillhouse.client.terminal.render import number_text, printable

_HIDDEN = frozenset({"ts", "level", "event", "run", "attempt", "exception"})
MAX_LINE_CHARACTERS = 1 << 16
"""A longer line is shown in pieces, as it is."""


class LogText:
    """Formats pieces of a log, whose lines may be cut between two of them."""

    def __init__(self) -> None:
        self._partial = ""
        self._attempt: object = None

    def add(self, piece: str) -> str:
        """The text of the lines that `piece` completes."""
        *lines, self._partial = (self._partial + piece).split("\n")
        if len(self._partial) > MAX_LINE_CHARACTERS:
            lines, self._partial = [*lines, self._partial], ""
        return "".join(self._line(line) + "\n" for line in lines)

    def end(self) -> str:
        """The text of a line that was not completed."""
        rest, self._partial = self._partial, ""
        return self._line(rest) + "\n" if rest else ""

    def _line(self, line: str) -> str:
        fields = _fields(line)
        if fields is None:
            return printable(line)
        text = _event(fields)
        attempt = fields.get("attempt", self._attempt)
        if attempt != self._attempt:
            text = f"Attempt {attempt}\n{text}"
        self._attempt = attempt
        return printable(text)


def _fields(line: str) -> dict[str, Any] | None:
    """The fields of an event; None for a line of another kind."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "event" in value else None


def _event(fields: dict[str, Any]) -> str:
    parts = [_time(fields.get("ts")), str(fields["event"])]
    if fields.get("level") not in ("info", "debug", None):
        parts.insert(1, str(fields["level"]).upper())
    parts += [f"{name}={_value(value)}" for name, value in fields.items() if name not in _HIDDEN]
    text = "  ".join(each for each in parts if each)
    return f"{text}\n{str(fields['exception']).rstrip()}" if fields.get("exception") else text


def _time(value: Any) -> str:
    """Local time of an event; empty if it has none that can be read."""
    try:
        return datetime.fromisoformat(value).astimezone().strftime("%H:%M:%S")
    except (TypeError, ValueError):
        return ""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return number_text(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
