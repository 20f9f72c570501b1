"""Pieces that schemas and operations of the document are put together from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.client.web.openapi.json_schema import REF, Schema
from stillhouse.client.web.problems import MEDIA_TYPE as PROBLEM

RUN_ID_SCHEMA: Schema = {"type": "string", "pattern": "^[a-z2-7]{12}$"}
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": ["number", "null"]}
TEXTS: Schema = {"type": "object", "additionalProperties": STRING}


def object_of(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    """An object with these properties."""
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def list_of(items: Schema) -> Schema:
    """A list of values."""
    return {"type": "array", "items": items}


def content_of(schema: Schema, media_type: str = "application/json") -> Schema:
    """The content of a body."""
    return {"content": {media_type: {"schema": schema}}}


def operation_of(summary: str, success: Mapping[str, Any], tag: str, **more: Any) -> Schema:
    """An operation whose failures are problem documents."""
    responses = {
        **success,
        "default": {"description": "What went wrong.", **content_of({"$ref": REF + "Problem"}, PROBLEM)},
    }
    return {"summary": summary, "tags": [tag], "responses": responses, **more}


def path_parameter(name: str, schema: Schema) -> Schema:
    """A parameter of a path."""
    return {"in": "path", "name": name, "required": True, "schema": schema}
