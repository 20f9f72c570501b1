"""The JSON Schema of a run file, generated from the trainer's configuration: defaults and choices without importing it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import Message


def schema_text() -> str:
    """The schema, draft 2020-12, as JSON with a line for each field."""
    return Path(__file__).with_name("run_schema.json").read_text(encoding="utf-8")


@cache
def _messages() -> dict[str, Any]:
    messages: dict[str, Any] = json.loads(schema_text())["$defs"]
    return messages


def is_offered(message: str, field: str) -> bool:
    """True if a run may set `field` of `message`: the contract also has some that are refused."""
    return field in _messages()[message]["properties"]


def setting(message: Message, field: str) -> Any:
    """Value of a field of a run's settings, or its default; KeyError if the default depends on other fields."""
    if message.HasField(field):
        return getattr(message, field)
    return _messages()[message.DESCRIPTOR.name]["properties"][field]["default"]
