"""The OpenAPI 3.1 document of the HTTP API."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from stillhouse.client.runfile.schema import schema_text
from stillhouse.client.web.api.messages import query_fields
from stillhouse.client.web.api.routes import PREFIX, ROUTES, Route
from stillhouse.client.web.openapi.json_schema import (
    REF,
    Schema,
    input_schema,
    message_schemas,
    request_schema,
)
from stillhouse.client.web.openapi.openai_paths import OPENAI_PATHS, OPENAI_SCHEMAS
from stillhouse.client.web.openapi.own_paths import OWN_PATHS, OWN_SCHEMAS
from stillhouse.client.web.openapi.parts import RUN_ID_SCHEMA
from stillhouse.client.web.openapi.run_paths import RUN_PATHS, RUN_SCHEMAS
from stillhouse.client.web.openapi.teacher_paths import TEACHER_ID_SCHEMA, TEACHER_PATHS, TEACHER_SCHEMAS
from stillhouse.client.web.problems import MEDIA_TYPE as PROBLEM
from stillhouse.client.web.upstream import RUN_SERVICE, TEACHER_SERVICE
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceServicer
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceServicer

_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")
_SERVICES = {
    "RunService": (RUN_SERVICE, RunServiceServicer),
    "TeacherService": (TEACHER_SERVICE, TeacherServiceServicer),
}
_NAME: Schema = {"type": "string", "minLength": 1}
_PATH_SCHEMAS: Mapping[str, Schema] = {
    "run": RUN_ID_SCHEMA,
    "teacher": TEACHER_ID_SCHEMA,
}
_TEXT: Schema = {"schema": {"type": "string"}}
_BINARY: Schema = {"schema": {}}
_STREAM_PARAMETERS: Mapping[str, tuple[tuple[str, str, Schema, str], ...]] = {
    "WatchRun": (
        ("header", "Last-Event-ID", {"type": "string"}, "Sequence of the last event that was seen."),
    ),
    "StreamLogs": (
        ("header", "Last-Event-ID", {"type": "string"}, "Byte behind the last line that was seen."),
    ),
    "DownloadArtifact": (
        ("header", "Range", {"type": "string"}, "One range of bytes, such as bytes=0-99."),
        ("header", "If-Range", {"type": "string"}, "Entity tag that the range belongs to."),
        ("header", "If-None-Match", {"type": "string"}, "Entity tags that the caller has."),
    ),
}
_HIDDEN: Mapping[str, frozenset[str]] = {
    "DownloadArtifact": frozenset({"start_offset"}),
    "AttachResult": frozenset({"data"}),
    "UploadDataset": frozenset({"data"}),
}
"""Fields of a request that are neither in its path nor in its query."""
_BODIES: Mapping[str, Schema] = {
    "AttachResult": {"application/json": {"schema": {"type": "object"}}},
    "UploadDataset": {"application/octet-stream": _BINARY},
}


@cache
def document() -> dict[str, Any]:
    """The document."""
    schemas: dict[str, Schema] = copy.deepcopy(
        {**OWN_SCHEMAS, **RUN_SCHEMAS, **TEACHER_SCHEMAS, **OPENAI_SCHEMAS}
    )
    schemas |= _run_file_schemas()
    paths: dict[str, Any] = copy.deepcopy({**OWN_PATHS, **RUN_PATHS, **TEACHER_PATHS, **OPENAI_PATHS})
    for route in ROUTES:
        path = PREFIX + _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stillhouse",
            "version": version("stillhouse"),
            "description": "The services of Stillhouse over HTTP: the fields are those of the contract in protos/stillhouse/v1.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "stillhouse_session"},
            },
        },
        "security": [{"token": []}, {"session": []}, {}],
    }


def _operation(route: Route, schemas: dict[str, Schema]) -> Schema:
    descriptor, servicer = _SERVICES[route.service]
    method = descriptor.methods_by_name[route.name]
    text = " ".join((getattr(servicer, route.name).__doc__ or "").split())
    operation: Schema = {
        "operationId": route.name,
        "tags": ["runs" if route.service == "RunService" else "teachers"],
        "summary": text.partition(". ")[0].rstrip("."),
        "description": text,
        "parameters": _parameters(route, method, schemas),
        "responses": {**_success(route, method, schemas), "default": problem("What went wrong.")},
    }
    body = _body(route, method, schemas)
    if body:
        operation["requestBody"] = {"content": body}
    return operation


def _parameters(route: Route, method: MethodDescriptor, schemas: dict[str, Schema]) -> list[Schema]:
    found = [
        {"in": "path", "name": name, "required": True, "schema": _PATH_SCHEMAS.get(name, _NAME)}
        for name in _PARAMETER.findall(route.path)
    ]
    if not route.takes_body:
        message = GetMessageClass(method.input_type)()
        hidden = {*route.fields, *_HIDDEN.get(route.name, ())}
        found += [
            {"in": "query", "name": each.name, "schema": _without_null(input_schema(each, schemas))}
            for each in query_fields(message)
            if each.name not in hidden
        ]
    found += [
        {"in": place, "name": name, "schema": schema, "description": text}
        for place, name, schema, text in _STREAM_PARAMETERS.get(route.name, ())
    ]
    return found


def _body(route: Route, method: MethodDescriptor, schemas: dict[str, Schema]) -> Schema:
    if route.takes_body:
        body = {
            "application/json": {
                "schema": request_schema(method.input_type, schemas, frozenset(route.fields))
            }
        }
        if route.name == "CreateRun":
            body["application/yaml"] = {"schema": {"type": "string", "description": "A run file."}}
        return body
    return dict(_BODIES.get(route.name, {}))


def _success(route: Route, method: MethodDescriptor, schemas: dict[str, Schema]) -> Schema:
    if route.status == 204:
        return {"204": {"description": "Done."}}
    if route.name == "DownloadArtifact":
        content = {"content": {"application/octet-stream": _BINARY}}
        return {
            "200": {"description": "The file.", **content},
            "206": {"description": "The range of it.", **content},
            "304": {"description": "The caller has it."},
            "416": {"description": "The file has no such bytes."},
        }
    if route.name in ("WatchRun", "StreamLogs"):
        kinds = ["run", "metrics"] if route.name == "WatchRun" else ["log"]
        content = {"text/event-stream": {"schema": _event_schema([*kinds, "problem", "end"])}}
        if route.name == "StreamLogs":
            content["text/plain"] = _TEXT
        return {
            "200": {"description": "The stream.", "content": content},
            "204": {"description": "Nothing follows what the caller has seen."},
        }
    reply = {"application/json": {"schema": message_schemas(method.output_type, schemas)}}
    answers = {str(route.status): {"description": "The response.", "content": reply}}
    if route.name == "CreateRun":
        answers["200"] = {"description": "The run that would be, with validate_only.", "content": reply}
    return answers


def _event_schema(kinds: list[str]) -> Schema:
    """The schema of one event of a stream."""
    properties = {"id": {"type": "string"}, "event": {"enum": kinds}, "data": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["event", "data"]}


def problem(description: str) -> Schema:
    """A response with a problem document."""
    return {"description": description, "content": {PROBLEM: {"schema": {"$ref": REF + "Problem"}}}}


def _without_null(schema: Schema) -> Schema:
    """The schema of a parameter, which cannot be null."""
    if "items" in schema:
        return {**schema, "items": _without_null(schema["items"])}
    if "enum" in schema:
        return {**schema, "enum": [each for each in schema["enum"] if each is not None]}
    return schema


def _run_file_schemas() -> dict[str, Schema]:
    """The JSON Schema of run files, with its parts among the components."""
    text = schema_text().replace('"#/$defs/', f'"{REF}RunFile.')
    parts: dict[str, Schema] = json.loads(text)["$defs"]
    renamed = {f"RunFile.{name}": each for name, each in parts.items()}
    return {"RunFile": {"$ref": f"{REF}RunFile.RunSpec"}, **renamed}
