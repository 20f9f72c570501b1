"""JSON of contract messages: snake_case names, 64-bit integers as numbers, RFC 3339 times, bytes as base64."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status

from stillhouse.client.core.errors import LocatedViolation
from stillhouse.protos.errors import StillhouseError, from_status

_PLAIN = frozenset(
    getattr(FieldDescriptor, f"TYPE_{name}")
    for name in ("DOUBLE", "FLOAT", "INT32", "INT64", "UINT32", "UINT64", "BOOL", "STRING")
)
"""Types of fields whose values are those of JSON."""


def dumps(value: object) -> str:
    """Returns one line of JSON. NaN and infinities become the strings "NaN", "Infinity" and "-Infinity"."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # a map that is no dict, or a number that is not finite
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def as_json(message: Message) -> dict[str, Any]:
    """Returns the fields of `message`. Unset optional values and messages are left out; enums are names without prefix.

    An unspecified enum value is null, and a google.rpc.Status is converted by error_as_json.
    """
    result: dict[str, Any] = {}
    for each in message.DESCRIPTOR.fields:
        field = cast("FieldDescriptor", each)
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if is_map(field):
            result[field.name] = dict(value)
        elif field.is_repeated:
            result[field.name] = (
                list(value) if field.type in _PLAIN else [_value(field, item) for item in value]
            )
        else:
            result[field.name] = _value(field, value)
    return result


def set_fields(message: Message) -> dict[str, Any]:
    """Returns the fields of `message` that are set, as as_json has them: those that a file needs to say."""
    result: dict[str, Any] = {}
    for field, value in message.ListFields():
        if is_map(field):
            result[field.name] = dict(value)
        elif field.is_repeated:
            result[field.name] = [_set_value(field, item) for item in value]
        else:
            result[field.name] = _set_value(field, value)
    return result


def error_as_json(error: StillhouseError) -> dict[str, Any]:
    """Returns reason and sentence of `error`, with its violations, metadata and retry time if any."""
    result: dict[str, Any] = {"reason": str(error.reason), "message": error.message}
    if error.violations:
        result["violations"] = violations_as_json(error)
    if error.metadata:
        result["metadata"] = dict(error.metadata)
    if error.retry_after_s is not None:
        result["retry_after_s"] = error.retry_after_s
    return result


def violations_as_json(error: StillhouseError) -> list[dict[str, Any]]:
    """Returns field and sentence of each violation, with line and column where they are known."""
    return [
        {"field": each.field, "description": each.description}
        | (
            {"line": each.line, "column": each.column}
            if isinstance(each, LocatedViolation) and each.line
            else {}
        )
        for each in error.violations
    ]


def _value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Status):
        return error_as_json(from_status(value))
    if isinstance(value, Message):
        return as_json(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if field.enum_type is not None:
        return enum_name(field.enum_type, value)
    return value


def _set_value(field: FieldDescriptor, value: Any) -> Any:
    is_plain = isinstance(value, Message) and not isinstance(value, Timestamp | Status)
    return set_fields(value) if is_plain else _value(field, value)


def enum_name(enum: Any, number: int) -> str | None:
    """Returns RUNNING for STATE_RUNNING; None for the unspecified value, the number as text for an unknown one."""
    if number == 0:
        return None
    known = enum.values_by_number.get(number)
    if known is None:
        return str(number)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(known.name.removeprefix(prefix))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def is_map(field: FieldDescriptor) -> bool:
    """True if `field` maps strings to strings, as `labels` does."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry
