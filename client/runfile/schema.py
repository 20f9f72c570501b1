"""The JSON Schema of a run file, generated from the trainer's configuration: defaults and choices without importing it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


def schema_text() -> str:
    """The schema, draft 2020-12, as JSON with a line for each field."""
    return Path(__file__).with_name("run_schema.json").read_text(encoding="utf-8")


@cache
def _messages() -> dict[str, Any]:
    messages: dict[str, Any] = json.loads(schema_text())["$defs"]
    return messages


def default(message: str, field: str) -> Any:
    """Default of a field of a message, such as "DataSpec", "seed"; KeyError if it depends on others."""
    return _property(message, field)["default"]


def words(message: str, field: str) -> list[str]:
    """Values that a field with choices may have."""
    return [word for word in _property(message, field)["enum"] if word is not None]


def _property(message: str, field: str) -> Any:
    return _messages()[message]["properties"][field]
