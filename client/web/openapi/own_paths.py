"""Parts of the OpenAPI document that no descriptor has: sessions, teachers, errors, tasks and the health of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.client.web.api.compatibility import REPORTS, TASKS
from stillhouse.client.web.api.routes import PREFIX
from stillhouse.client.web.api.run_creation import MAX_RUN_BYTES
from stillhouse.client.web.api.run_files import MAX_CHANGES
from stillhouse.client.web.openapi.json_schema import REF, Schema
from stillhouse.client.web.problems import MEDIA_TYPE as PROBLEM
from stillhouse.protos.errors import Reason

RUN_ID_SCHEMA: Schema = {"type": "string", "pattern": "^[a-z2-7]{12}$"}
_STRING: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "object", "additionalProperties": _STRING}
_REASON: Schema = {"enum": [str(each) for each in Reason]}
_NUMBER: Schema = {"type": ["number", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_VIOLATION: Schema = {
    "type": "object",
    "properties": {
        "field": _STRING,
        "description": _STRING,
        "line": {"type": "integer"},
        "column": {"type": "integer"},
    },
    "required": ["field", "description"],
}
_FAILURE: Schema = {
    "reason": _REASON,
    "violations": {"type": "array", "items": _VIOLATION},
    "metadata": _TEXTS,
    "retry_after_s": {"type": "number"},
}

_INTEGER: Schema = {"type": "integer", "minimum": 0}


def _object(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_SUBJECT: Schema = {"enum": ["before", "along", "after"]}
_EXAMPLE_TARGET = _object(
    {"at": _INTEGER, "student_logprob": _NUMBER, "teacher_logprob": _NUMBER, "student_tail": _NUMBER}
    | {
        "top": _list(
            {"type": "array", "prefixItems": [_INTEGER, _NUMBER, _NUMBER], "minItems": 3, "maxItems": 3}
        )
    },
    kl=_NUMBER,
    teacher_tail=_NUMBER,
)
_EXAMPLE_ROW = _object(
    {
        "set": _STRING,
        "number": _INTEGER,
        "place": _STRING,
        "begin": _INTEGER,
        "num_tokens": _INTEGER,
        "tokens": _list(_INTEGER),
        "texts": _list(_STRING),
        "targets": _list(_EXAMPLE_TARGET),
    }
)
_EVALUATION = _object({"step": _INTEGER, "subject": _SUBJECT, "path": _STRING, "kl": _NUMBER})

OWN_SCHEMAS: Mapping[str, Schema] = {
    "ExampleIndex": {
        **_object({"format": _INTEGER, "evaluations": _list(_EVALUATION)}),
        "description": "The evaluations of a run that have examples, ascending by step; kl is the mean over the shown tokens.",
    },
    "Examples": {
        **_object(
            {
                "format": _INTEGER,
                "step": _INTEGER,
                "subject": _SUBJECT,
                "top_k": _INTEGER,
                "teacher_top_k": _INTEGER,
                "from_cache": {"type": "boolean"},
                "left_out": _INTEGER,
                "rows": _list(_EXAMPLE_ROW),
                "texts": _TEXTS,
            }
        ),
        "description": "Tokens of a few held-out rows at one evaluation. `top` has [id, teacher's log-probability, student's "
        "log-probability] of both models' likeliest tokens; null is a token in the teacher's tail, or no finite number.",
    },
    "Problem": {
        "type": "object",
        "description": "A problem document of RFC 9457.",
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": _STRING,
            "status": {"type": "integer"},
            "detail": _STRING,
            "remedy": _STRING,
            **_FAILURE,
        },
        "required": ["type", "title", "status", "detail", "reason", "remedy"],
    },
    "Error": {
        "type": "object",
        "description": "Why a run or an attempt failed.",
        "properties": {"message": _STRING, **_FAILURE},
        "required": ["reason", "message"],
    },
    "Session": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["anonymous", "token", "server"]},
            "csrf_token": {"type": ["string", "null"]},
            "access": _TEXTS,
        },
        "required": ["kind", "csrf_token", "access"],
    },
    "Task": {
        "type": "object",
        "properties": {
            "taskId": _STRING,
            "taskName": _STRING,
            "status": {"enum": ["PENDING", "RUNNING", "STOPPED", "COMPLETED", "FAILED"]},
            "progress": {"type": "number", "minimum": 0, "maximum": 100},
            "currentEpoch": {"type": "number"},
            "accuracy": _NUMBER,
            "loss": _NUMBER,
            "errorMessage": {"type": ["string", "null"]},
        },
        "required": ["taskId", "status", "progress"],
    },
}


def _content(schema: Schema, media_type: str = "application/json") -> Schema:
    return {"content": {media_type: {"schema": schema}}}


def _operation(summary: str, success: Mapping[str, Any], tag: str, **more: Any) -> Schema:
    responses = {
        **success,
        "default": {"description": "What went wrong.", **_content({"$ref": REF + "Problem"}, PROBLEM)},
    }
    return {"summary": summary, "tags": [tag], "responses": responses, **more}


def _task_operation(summary: str, **more: Any) -> Schema:
    envelope = {
        "type": "object",
        "properties": {"code": {"type": "integer"}, "data": {"type": "object"}, "message": _STRING},
        "required": ["code", "data", "message"],
    }
    task = {**envelope, "properties": {**envelope["properties"], "data": {"$ref": REF + "Task"}}}  # type: ignore[dict-item]
    responses = {
        "200": {"description": "The task.", **_content(task)},
        "default": {"description": "What went wrong.", **_content(envelope)},
    }
    return {"summary": summary, "tags": ["tasks"], "responses": responses, **more}


_TASK_ID: Schema = {
    "in": "path",
    "name": "task",
    "required": True,
    "schema": RUN_ID_SCHEMA,
}
_RUN_ID: Schema = {**_TASK_ID, "name": "run"}
_STEP: Schema = {"type": "string", "pattern": "^[0-9]{1,15}$"}
_SESSION: Schema = {"description": "The session.", **_content({"$ref": REF + "Session"})}
_SIGN_IN: Schema = {
    "type": "object",
    "properties": {"token": _STRING},
    "required": ["token"],
    "additionalProperties": False,
}
_TEACHERS: Schema = {
    "type": "object",
    "properties": {
        "teachers": {
            "type": "array",
            "items": {"type": "object", "properties": {"id": _STRING, "target": _STRING}},
        }
    },
}

_TEXT_OF_RUN: Schema = {"type": "string", "maxLength": MAX_RUN_BYTES, "description": "A run file in YAML."}
_CHANGE: Schema = {
    "type": "object",
    "description": "A value to set, or null to remove it, at a path such as loss.terms[0].weight.",
    "properties": {
        "path": _STRING,
        "value": {
            "anyOf": [_STRING, {"type": "array", "items": _STRING}, _TEXTS, {"type": "null"}],
        },
    },
    "required": ["path", "value"],
    "additionalProperties": False,
}
_CHECK: Schema = {
    "type": "object",
    "properties": {
        "text": _TEXT_OF_RUN,
        "changes": {"type": "array", "items": _CHANGE, "maxItems": MAX_CHANGES},
        "opened": {**_TEXT_OF_RUN, "description": "The run file that the command line begins with."},
        "validate": {"type": "boolean", "default": True, "description": "Ask the run service, too."},
    },
    "required": ["text"],
    "additionalProperties": False,
}
_CHECKED: Schema = {
    "type": "object",
    "properties": {
        "text": _STRING,
        "keeps_comments": {"type": "boolean"},
        "problems": {"type": "array", "items": _VIOLATION},
        "written": {"type": "object", "description": "The settings that the file has."},
        "effective_spec": {"$ref": REF + "RunSpec"},
        "command": {"type": ["string", "null"]},
    },
    "required": ["text", "keeps_comments", "problems"],
}
_ESTIMATE: Schema = {
    "type": "object",
    "properties": {"text": _TEXT_OF_RUN},
    "required": ["text"],
    "additionalProperties": False,
}
_PART: Schema = {
    "type": "object",
    "properties": {
        "total_bytes": _COUNT,
        "fits": {"type": "boolean"},
        "parts_bytes": {"type": "object", "additionalProperties": _COUNT},
    },
    "required": ["total_bytes", "fits", "parts_bytes"],
}
_FORECAST: Schema = {
    "type": "object",
    "properties": {
        "device": {"enum": ["cpu", "gpu"]},
        "memory_bytes": _COUNT,
        "parameters": _COUNT,
        "student": _PART,
        "together": {"type": "object"},
        "remedies": {"type": "array", "items": {"type": "object"}},
        "fits": {"type": "boolean"},
    },
    "required": ["device", "memory_bytes", "parameters", "student", "together", "remedies", "fits"],
}

OWN_PATHS: Mapping[str, Schema] = {
    f"{PREFIX}/session": {
        "get": _operation("Who the caller is", {"200": _SESSION}, "session"),
        "post": _operation(
            "Sign in", {"201": _SESSION}, "session", requestBody={"required": True, **_content(_SIGN_IN)}
        ),
        "delete": _operation("Sign out", {"204": {"description": "Done."}}, "session"),
    },
    f"{PREFIX}/runs/{{run}}/examples": {
        "get": _operation(
            "List the evaluations of a run that have examples",
            {"200": {"description": "The evaluations.", **_content({"$ref": REF + "ExampleIndex"})}},
            "runs",
            parameters=[_RUN_ID],
        )
    },
    f"{PREFIX}/runs/{{run}}/examples/{{step}}": {
        "get": _operation(
            "Get the examples of one evaluation",
            {"200": {"description": "The examples.", **_content({"$ref": REF + "Examples"})}},
            "runs",
            parameters=[_RUN_ID, {"in": "path", "name": "step", "required": True, "schema": _STEP}],
        )
    },
    f"{PREFIX}/teachers": {
        "get": _operation(
            "List the teachers", {"200": {"description": "The teachers.", **_content(_TEACHERS)}}, "teachers"
        )
    },
    f"{PREFIX}/errors/{{reason}}": {
        "get": _operation(
            "Explain a reason",
            {"200": {"description": "Meaning and remedy.", **_content(_TEXTS)}},
            "errors",
            parameters=[{"in": "path", "name": "reason", "required": True, "schema": _REASON}],
        )
    },
    f"{PREFIX}/run-files/schema": {
        "get": _operation(
            "Get the JSON Schema of a run file",
            {"200": {"description": "The schema.", **_content({"type": "object"})}},
            "runs",
        )
    },
    f"{PREFIX}/run-files:check": {
        "post": _operation(
            "Edit and check a run file",
            {"200": {"description": "Its text, values and problems.", **_content(_CHECKED)}},
            "runs",
            requestBody={"required": True, **_content(_CHECK)},
        )
    },
    f"{PREFIX}/run-files:estimate": {
        "post": _operation(
            "Forecast the memory of a run",
            {"200": {"description": "The forecast.", **_content(_FORECAST)}},
            "runs",
            requestBody={"required": True, **_content(_ESTIMATE)},
        )
    },
    "/healthz": {
        "get": _operation(
            "Say that the server runs", {"200": {"description": "It does.", **_content(_TEXTS)}}, "health"
        )
    },
    TASKS: {
        "post": _task_operation(
            "Create a task", requestBody=_content({"type": "object", "description": "The task form."})
        )
    },
    f"{TASKS}/{{task}}": {"get": _task_operation("Get a task", parameters=[_TASK_ID])},
    f"{TASKS}/{{task}}/start": {"post": _task_operation("Start a task", parameters=[_TASK_ID])},
    f"{TASKS}/{{task}}/complete": {"post": _task_operation("Confirm a task's end", parameters=[_TASK_ID])},
    f"{TASKS}/{{task}}/progress": {
        "put": _task_operation(
            "Report a task's progress",
            parameters=[
                _TASK_ID,
                *({"in": "query", "name": name, "schema": {"type": "number"}} for name in REPORTS),
            ],
        )
    },
}
