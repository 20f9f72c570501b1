"""Parts of the OpenAPI document that no descriptor has: sessions, teachers, errors, tasks and the health of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.client.web.api.compatibility import REPORTS, TASKS
from stillhouse.client.web.api.routes import PREFIX
from stillhouse.client.web.api.run_creation import MAX_RUN_BYTES
from stillhouse.client.web.api.run_files import MAX_CHANGES
from stillhouse.client.web.openapi.json_schema import REF, Schema
from stillhouse.client.web.openapi.parts import (
    NUMBER,
    RUN_ID_SCHEMA,
    STRING,
    TEXTS,
    content_of,
    operation_of,
)
from stillhouse.protos.errors import Reason

_REASON: Schema = {"enum": [str(each) for each in Reason]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_VIOLATION: Schema = {
    "type": "object",
    "properties": {
        "field": STRING,
        "description": STRING,
        "line": {"type": "integer"},
        "column": {"type": "integer"},
    },
    "required": ["field", "description"],
}
_FAILURE: Schema = {
    "reason": _REASON,
    "violations": {"type": "array", "items": _VIOLATION},
    "metadata": TEXTS,
    "retry_after_s": {"type": "number"},
}

OWN_SCHEMAS: Mapping[str, Schema] = {
    "Problem": {
        "type": "object",
        "description": "A problem document of RFC 9457.",
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": STRING,
            "status": {"type": "integer"},
            "detail": STRING,
            "remedy": STRING,
            **_FAILURE,
        },
        "required": ["type", "title", "status", "detail", "reason", "remedy"],
    },
    "Error": {
        "type": "object",
        "description": "Why a run or an attempt failed.",
        "properties": {"message": STRING, **_FAILURE},
        "required": ["reason", "message"],
    },
    "Session": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["anonymous", "token", "server"]},
            "csrf_token": {"type": ["string", "null"]},
            "access": TEXTS,
        },
        "required": ["kind", "csrf_token", "access"],
    },
    "Task": {
        "type": "object",
        "properties": {
            "taskId": STRING,
            "taskName": STRING,
            "status": {"enum": ["PENDING", "RUNNING", "STOPPED", "COMPLETED", "FAILED"]},
            "progress": {"type": "number", "minimum": 0, "maximum": 100},
            "currentEpoch": {"type": "number"},
            "accuracy": NUMBER,
            "loss": NUMBER,
            "errorMessage": {"type": ["string", "null"]},
        },
        "required": ["taskId", "status", "progress"],
    },
}


def _task_operation(summary: str, **more: Any) -> Schema:
    envelope = {
        "type": "object",
        "properties": {"code": {"type": "integer"}, "data": {"type": "object"}, "message": STRING},
        "required": ["code", "data", "message"],
    }
    task = {**envelope, "properties": {**envelope["properties"], "data": {"$ref": REF + "Task"}}}  # type: ignore[dict-item]
    responses = {
        "200": {"description": "The task.", **content_of(task)},
        "default": {"description": "What went wrong.", **content_of(envelope)},
    }
    return {"summary": summary, "tags": ["tasks"], "responses": responses, **more}


_TASK_ID: Schema = {
    "in": "path",
    "name": "task",
    "required": True,
    "schema": RUN_ID_SCHEMA,
}
_SESSION: Schema = {"description": "The session.", **content_of({"$ref": REF + "Session"})}
_SIGN_IN: Schema = {
    "type": "object",
    "properties": {"token": STRING},
    "required": ["token"],
    "additionalProperties": False,
}
_TEACHERS: Schema = {
    "type": "object",
    "properties": {
        "teachers": {
            "type": "array",
            "items": {"type": "object", "properties": {"id": STRING, "target": STRING}},
        }
    },
}

_TEXT_OF_RUN: Schema = {"type": "string", "maxLength": MAX_RUN_BYTES, "description": "A run file in YAML."}
_CHANGE: Schema = {
    "type": "object",
    "description": "A value to set, or null to remove it, at a path such as loss.terms[0].weight.",
    "properties": {
        "path": STRING,
        "value": {
            "anyOf": [STRING, {"type": "array", "items": STRING}, TEXTS, {"type": "null"}],
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
        "text": STRING,
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
        "get": operation_of("Who the caller is", {"200": _SESSION}, "session"),
        "post": operation_of(
            "Sign in", {"201": _SESSION}, "session", requestBody={"required": True, **content_of(_SIGN_IN)}
        ),
        "delete": operation_of("Sign out", {"204": {"description": "Done."}}, "session"),
    },
    f"{PREFIX}/teachers": {
        "get": operation_of(
            "List the teachers",
            {"200": {"description": "The teachers.", **content_of(_TEACHERS)}},
            "teachers",
        )
    },
    f"{PREFIX}/errors/{{reason}}": {
        "get": operation_of(
            "Explain a reason",
            {"200": {"description": "Meaning and remedy.", **content_of(TEXTS)}},
            "errors",
            parameters=[{"in": "path", "name": "reason", "required": True, "schema": _REASON}],
        )
    },
    f"{PREFIX}/run-files/schema": {
        "get": operation_of(
            "Get the JSON Schema of a run file",
            {"200": {"description": "The schema.", **content_of({"type": "object"})}},
            "runs",
        )
    },
    f"{PREFIX}/run-files:check": {
        "post": operation_of(
            "Edit and check a run file",
            {"200": {"description": "Its text, values and problems.", **content_of(_CHECKED)}},
            "runs",
            requestBody={"required": True, **content_of(_CHECK)},
        )
    },
    f"{PREFIX}/run-files:estimate": {
        "post": operation_of(
            "Forecast the memory of a run",
            {"200": {"description": "The forecast.", **content_of(_FORECAST)}},
            "runs",
            requestBody={"required": True, **content_of(_ESTIMATE)},
        )
    },
    "/healthz": {
        "get": operation_of(
            "Say that the server runs", {"200": {"description": "It does.", **content_of(TEXTS)}}, "health"
        )
    },
    TASKS: {
        "post": _task_operation(
            "Create a task", requestBody=content_of({"type": "object", "description": "The task form."})
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
