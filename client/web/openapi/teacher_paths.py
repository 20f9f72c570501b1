"""Parts of the document on prompts that are tried on a teacher."""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.client.web.api.routes import PREFIX
from stillhouse.client.web.openapi.json_schema import REF, Schema, request_schema
from stillhouse.client.web.openapi.parts import (
    INTEGER,
    NUMBER,
    STRING,
    content_of,
    list_of,
    object_of,
    operation_of,
    path_parameter,
)
from stillhouse.client.web.teachers.ask import MAX_ADAPTER_CHARS, MAX_SAMPLES, MAX_TOP_K
from stillhouse.protos.rows.conversation import OPTIONS
from stillhouse.protos.stillhouse.v1.teacher_pb2 import SamplingParams

TEACHER_ID_SCHEMA: Schema = {"type": "string", "pattern": "^[1-9][0-9]*$"}
_TEACHER = path_parameter("teacher", TEACHER_ID_SCHEMA)
_INT32: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_INPUT: Mapping[str, Schema] = {
    "text": {"type": "string", "minLength": 1},
    "token_ids": {"type": "array", "items": _INT32, "minItems": 1},
    "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
    "tools": {"type": "array", "items": {"type": "object"}},
    OPTIONS: {"type": "object"},
    "adapter": {"type": "string", "maxLength": MAX_ADAPTER_CHARS},
    "top_k": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_K},
}
_ONE_INPUT = [{"required": [name]} for name in ("text", "token_ids", "messages")]
_LIKELY = object_of({"id": INTEGER, "text": STRING, "logprob": NUMBER})
_PLAIN = object_of({"id": INTEGER, "text": STRING})
_TOKEN = object_of(
    {"id": INTEGER, "text": STRING, "logprob": NUMBER, "top": list_of(_LIKELY), "tail": NUMBER}
)
_EVENT = object_of(
    {"event": {"enum": ["chunk", "problem", "end"]}, "data": {**STRING, "description": "JSON."}}
)


def _body(**more: Schema) -> Schema:
    schema = {
        "type": "object",
        "properties": {**_INPUT, **more},
        "additionalProperties": False,
        "oneOf": _ONE_INPUT,
    }
    return {"required": True, **content_of(schema)}


TEACHER_SCHEMAS: Mapping[str, Schema] = {
    "ScoredText": {
        **object_of({"start": INTEGER, "before": list_of(_PLAIN), "tokens": list_of(_TOKEN)}),
        "description": "Tokens of a text from `start` on, each with its log-probability, the likeliest tokens in its place, and "
        "`tail`, the log of the mass of all others; null is minus infinity.",
    },
}

TEACHER_PATHS: Mapping[str, Schema] = {
    f"{PREFIX}/teachers/{{teacher}}:generate": {
        "post": operation_of(
            "Continue a prompt",
            {
                "200": {
                    "description": "Events: chunks of the samples as they grow, then the numbers of tokens.",
                    **content_of(_EVENT, "text/event-stream"),
                }
            },
            "teachers",
            parameters=[_TEACHER],
            requestBody=_body(
                sampling=request_schema(SamplingParams.DESCRIPTOR, {}, frozenset()),
                num_samples={"type": "integer", "minimum": 1, "maximum": MAX_SAMPLES},
            ),
        )
    },
    f"{PREFIX}/teachers/{{teacher}}:score": {
        "post": operation_of(
            "Score the tokens of a text",
            {"200": {"description": "The tokens.", **content_of({"$ref": REF + "ScoredText"})}},
            "teachers",
            parameters=[_TEACHER],
            requestBody=_body(start={**_INT32, "minimum": 1}),
        )
    },
}
