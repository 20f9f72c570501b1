"""Parts of the document on what runs leave: examples of their evaluations, and caches."""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.client.web.api.routes import PREFIX
from stillhouse.client.web.openapi.json_schema import REF, Schema
from stillhouse.client.web.openapi.parts import (
    INTEGER,
    NUMBER,
    RUN_ID_SCHEMA,
    STRING,
    TEXTS,
    content_of,
    list_of,
    object_of,
    operation_of,
    path_parameter,
)

_RUN_ID = path_parameter("run", RUN_ID_SCHEMA)
_STEP = path_parameter("step", {"type": "string", "pattern": "^[0-9]{1,15}$"})
_SUBJECT: Schema = {"enum": ["before", "along", "after"]}
_EXAMPLE_TARGET = object_of(
    {"at": INTEGER, "student_logprob": NUMBER, "teacher_logprob": NUMBER, "student_tail": NUMBER}
    | {
        "top": list_of(
            {"type": "array", "prefixItems": [INTEGER, NUMBER, NUMBER], "minItems": 3, "maxItems": 3}
        )
    },
    kl=NUMBER,
    teacher_tail=NUMBER,
)
_EXAMPLE_ROW = object_of(
    {
        "set": STRING,
        "number": INTEGER,
        "place": STRING,
        "begin": INTEGER,
        "num_tokens": INTEGER,
        "tokens": list_of(INTEGER),
        "texts": list_of(STRING),
        "targets": list_of(_EXAMPLE_TARGET),
    }
)
_EVALUATION = object_of({"step": INTEGER, "subject": _SUBJECT, "path": STRING, "kl": NUMBER})

_CACHE = object_of(
    {
        "path": STRING,
        "last_run": STRING,
        "use": STRING,
        "state": {"type": ["string", "null"]},
        "num_runs": INTEGER,
        "build": {"type": ["string", "null"]},
        "data": list_of(STRING),
        "target_form": STRING,
    }
)

RUN_SCHEMAS: Mapping[str, Schema] = {
    "ExampleIndex": {
        **object_of({"format": INTEGER, "evaluations": list_of(_EVALUATION)}),
        "description": "The evaluations of a run that have examples, ascending by step; kl is the mean over the shown tokens.",
    },
    "Examples": {
        **object_of(
            {
                "format": INTEGER,
                "step": INTEGER,
                "subject": _SUBJECT,
                "top_k": INTEGER,
                "teacher_top_k": INTEGER,
                "from_cache": {"type": "boolean"},
                "left_out": INTEGER,
                "rows": list_of(_EXAMPLE_ROW),
                "texts": TEXTS,
            }
        ),
        "description": "Tokens of a few held-out rows at one evaluation. `top` has [id, teacher's log-probability, student's "
        "log-probability] of both models' likeliest tokens; null is a token in the teacher's tail, or no finite number.",
    },
    "Caches": {
        **object_of({"caches": list_of(_CACHE), "searched_runs": INTEGER}),
        "description": "The caches that the newest runs name, most recently used first. `build` is the run that built it.",
    },
    "CacheContents": {
        "type": "object",
        "description": "Sequences, tokens and bytes of a cache, of each kind of outputs in it, and its files.",
    },
}

RUN_PATHS: Mapping[str, Schema] = {
    f"{PREFIX}/runs/{{run}}/examples": {
        "get": operation_of(
            "List the evaluations of a run that have examples",
            {"200": {"description": "The evaluations.", **content_of({"$ref": REF + "ExampleIndex"})}},
            "runs",
            parameters=[_RUN_ID],
        )
    },
    f"{PREFIX}/runs/{{run}}/examples/{{step}}": {
        "get": operation_of(
            "Get the examples of one evaluation",
            {"200": {"description": "The examples.", **content_of({"$ref": REF + "Examples"})}},
            "runs",
            parameters=[_RUN_ID, _STEP],
        )
    },
    f"{PREFIX}/runs/{{run}}/cache": {
        "get": operation_of(
            "Get the contents of the cache that a run built",
            {"200": {"description": "The contents.", **content_of({"$ref": REF + "CacheContents"})}},
            "caches",
            parameters=[_RUN_ID],
        )
    },
    f"{PREFIX}/caches": {
        "get": operation_of(
            "List the caches that runs name",
            {"200": {"description": "The caches.", **content_of({"$ref": REF + "Caches"})}},
            "caches",
        )
    },
}
