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


def rules(message: str, field: str) -> dict[str, Any]:
    """JSON Schema of a value of a field, or of an item of its list; empty for a field that is not offered."""
    found: dict[str, Any] = _messages()[message]["properties"].get(field, {})
    return next((each["items"] for each in found.get("anyOf", ()) if "items" in each), found)


def holds_json(message: str, field: str) -> bool:
    """True if `field` of `message` is JSON text, in whose place a run file may have the value itself."""
    properties = _messages().get(message, {}).get("properties", {})
    return "contentMediaType" in properties.get(field, {})


def word_field(message: str, field: str) -> str | None:
    """The field of its message that a word in the list `field` of `message` stands for; None where no word may stand."""
    items = rules(message, field) if message in _messages() else {}
    named = [each["$ref"].rpartition("/")[2] for each in items.get("anyOf", ()) if "$ref" in each]
    return next((str(name) for each in named for name in _messages()[each]["required"]), None)


def setting(message: Message, field: str) -> Any:
    """Value of a field of a run's settings, or its default; KeyError if the default depends on other fields."""
    if message.HasField(field):
        return getattr(message, field)
    return _messages()[message.DESCRIPTOR.name]["properties"][field]["default"]
