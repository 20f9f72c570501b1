"""JSON Schema of contract messages, in the mapping of client/core/json_output.py."""

from __future__ import annotations

from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status

from stillhouse.client.core.json_output import is_map
from stillhouse.client.web.api.messages import enum_names

Schema = dict[str, Any]
REF = "#/components/schemas/"
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def message_schemas(descriptor: Descriptor, known: dict[str, Schema]) -> Schema:
    """A reference to the schema of a message; adds it, and those that it needs, to `known` by name."""
    name = descriptor.full_name.removeprefix("stillhouse.v1.")
    if name not in known:
        known[name] = {}  # ends the recursion of a message that holds itself
        fields = cast("list[FieldDescriptor]", descriptor.fields)
        known[name] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {each.name: _field(each, known) for each in fields},
            "required": [each.name for each in fields if not each.has_presence],
        }
        if not known[name]["required"]:
            del known[name]["required"]
    return {"$ref": REF + name}


def request_schema(descriptor: Descriptor, known: dict[str, Schema], hidden: frozenset[str]) -> Schema:
    """The schema of a request's body: no field is required by it, and `hidden` ones stand elsewhere."""
    fields = cast("list[FieldDescriptor]", descriptor.fields)
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {each.name: input_schema(each, known) for each in fields if each.name not in hidden},
    }


def input_schema(field: FieldDescriptor, known: dict[str, Schema]) -> Schema:
    """The schema of a field of a request."""
    message = field.message_type
    if message is None or is_map(field):
        return _field(field, known)
    one = (
        {"$ref": REF + "RunFile"}
        if message.name == "RunSpec"
        else request_schema(message, known, frozenset())
    )
    return {"type": "array", "items": one} if field.is_repeated else one


def _field(field: FieldDescriptor, known: dict[str, Schema]) -> Schema:
    if is_map(field) and field.message_type is not None:
        value = field.message_type.fields_by_name["value"]
        return {"type": "object", "additionalProperties": _one(value, known)}
    one = _one(field, known)
    return {"type": "array", "items": one} if field.is_repeated else one


def _one(field: FieldDescriptor, known: dict[str, Schema]) -> Schema:
    if field.message_type is not None:
        if field.message_type.full_name == Timestamp.DESCRIPTOR.full_name:
            return {"type": "string", "format": "date-time"}
        if field.message_type.full_name == Status.DESCRIPTOR.full_name:
            return {"$ref": REF + "Error"}
        return message_schemas(field.message_type, known)
    if field.enum_type is not None:
        return {"enum": [*enum_names(field.enum_type), None]}
    if field.cpp_type in _INTEGERS:
        least, most = _INTEGERS[field.cpp_type]
        return {"type": "integer", "minimum": least, "maximum": most}
    if field.cpp_type in _FLOATS:
        return {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"type": "boolean"}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "contentEncoding": "base64"}
    return {"type": "string"}
