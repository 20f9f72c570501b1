"""Paths of OpenAI's API in the OpenAPI document; their errors have OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.client.batch.openai_input import INTERFACES
from stillhouse.client.web.openai.ask import MAX_CHOICES, MAX_PROMPTS, MAX_STOP_STRINGS
from stillhouse.client.web.openai.errors import PREFIX
from stillhouse.client.web.openapi.json_schema import REF, Schema
from stillhouse.protos.errors import Reason

TAG = "openai"
_TEXT: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TIME: Schema = {"type": ["integer", "null"]}
_OBJECT: Schema = {"type": "object"}
_BOOLEAN: Schema = {"type": ["boolean", "null"]}


def _of(*required: str, **properties: Schema) -> Schema:
    """An object with these properties."""
    schema: Schema = {"type": "object", "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def _all(**properties: Schema) -> Schema:
    """An object that has all of these properties."""
    return _of(*properties, **properties)


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _number(kind: str, **limits: float) -> Schema:
    return {"type": [kind, "null"], **limits}


_USAGE = _all(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls", None]}
_CALL = _all(id=_TEXT, type={"const": "function"}, function=_all(name=_TEXT, arguments=_TEXT))
_MESSAGE = _of("role", "content", role={"const": "assistant"}, content=_TEXT_OR_NULL, tool_calls=_list(_CALL))
_LOGPROBS: Schema = {"type": ["object", "null"]}
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}


def _page(schema: str) -> Schema:
    return _of(
        *("object", "data", "has_more"),
        object={"const": "list"},
        data=_list({"$ref": REF + schema}),
        has_more={"type": "boolean"},
        first_id=_TEXT_OR_NULL,
        last_id=_TEXT_OR_NULL,
    )


OPENAI_SCHEMAS: Mapping[str, Schema] = {
    "OpenAiError": _all(
        error=_all(
            message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code={"enum": [str(each) for each in Reason]}
        )
    ),
    "Model": _of(
        *("id", "object", "created", "owned_by"),
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        max_model_len=_COUNT,
        parent=_TEXT,
    ),
    "Completion": _all(
        **_HEAD,
        object={"const": "text_completion"},
        choices=_list(_all(index=_COUNT, text=_TEXT, finish_reason=_FINISH, logprobs=_LOGPROBS)),
        usage=_USAGE,
    ),
    "ChatCompletion": _all(
        **_HEAD,
        object={"const": "chat.completion"},
        choices=_list(_all(index=_COUNT, message=_MESSAGE, finish_reason=_FINISH, logprobs=_LOGPROBS)),
        usage=_USAGE,
    ),
    "File": _all(
        id=_TEXT,
        object={"const": "file"},
        bytes=_COUNT,
        created_at=_COUNT,
        expires_at=_TIME,
        filename=_TEXT,
        purpose={"enum": ["batch", "batch_output"]},
        status=_TEXT,
    ),
    "Batch": _of(
        *("id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at"),
        *("request_counts", "errors", "output_file_id", "error_file_id", "metadata"),
        id=_TEXT,
        object={"const": "batch"},
        endpoint={"enum": list(INTERFACES)},
        model=_TEXT_OR_NULL,
        input_file_id=_TEXT,
        completion_window=_TEXT,
        status={
            "enum": [
                *("validating", "failed", "in_progress", "finalizing"),
                *("completed", "expired", "cancelling", "cancelled"),
            ]
        },
        created_at=_COUNT,
        request_counts=_all(total=_COUNT, completed=_COUNT, failed=_COUNT),
        errors={"type": ["object", "null"]},
        output_file_id=_TEXT_OR_NULL,
        error_file_id=_TEXT_OR_NULL,
        metadata={"type": ["object", "null"], "additionalProperties": _TEXT},
    ),
}
_SAMPLING: Mapping[str, Schema] = {
    "model": {"type": "string", "minLength": 1},
    "max_tokens": _number("integer", minimum=1),
    "n": _number("integer", minimum=1, maximum=MAX_CHOICES),
    "temperature": _number("number", minimum=0, maximum=1000),
    "top_p": _number("number", minimum=0, maximum=1),
    "top_k": _number("integer", minimum=0),
    "seed": _number("integer"),
    "stop": {"anyOf": [_TEXT, {**_list(_TEXT), "maxItems": MAX_STOP_STRINGS}, {"type": "null"}]},
    "stream": _BOOLEAN,
}
_IDS: Schema = {**_list(_COUNT), "minItems": 1}
_COMPLETION = {
    **_of(
        *("model", "prompt"),
        **_SAMPLING,
        prompt={
            "anyOf": [
                _TEXT,
                _IDS,
                {**_list({"anyOf": [_TEXT, _IDS]}), "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        },
        logprobs=_number("integer", minimum=0),
        echo=_BOOLEAN,
    ),
    "additionalProperties": False,
}
_CHAT = {
    **_of(
        *("model", "messages"),
        **_SAMPLING,
        messages={
            **_list(_of("role", "content", role={"enum": ["system", "user", "assistant"]}, content=_TEXT)),
            "minItems": 1,
        },
        max_completion_tokens=_number("integer", minimum=1),
        logprobs=_BOOLEAN,
        top_logprobs=_number("integer", minimum=0),
        tools={"type": ["array", "null"], "items": _OBJECT},
        tool_choice={"enum": ["auto", "none", None]},
    ),
    "additionalProperties": False,
}
_NEW_BATCH = {
    **_of(
        *("input_file_id", "endpoint", "completion_window"),
        input_file_id={"type": "string", "minLength": 1},
        endpoint={"enum": list(INTERFACES)},
        completion_window={"type": "string", "pattern": "^[1-9][0-9]{0,2}[hd]$"},
        metadata={"type": ["object", "null"], "additionalProperties": _TEXT, "maxProperties": 16},
    ),
    "additionalProperties": False,
}
_UPLOAD = _of(
    "file",
    "purpose",
    file={"type": "string", "contentMediaType": "application/jsonl"},
    purpose={"const": "batch"},
)
_DELETED = _all(id=_TEXT, object={"const": "file"}, deleted={"type": "boolean"})


def _ref(name: str) -> Schema:
    return {"$ref": REF + name}


def _content(schema: Schema, media_type: str = "application/json") -> dict[str, Any]:
    return {"content": {media_type: {"schema": schema}}}


def _operation(summary: str, schema: Schema, *, stream: bool = False, **more: Any) -> Schema:
    success = {"description": "The response.", **_content(schema)}
    if stream:
        success["content"]["text/event-stream"] = {"schema": _OBJECT}
    failure = {"description": "What went wrong.", **_content(_ref("OpenAiError"))}
    return {"summary": summary, "tags": [TAG], "responses": {"200": success, "default": failure}, **more}


def _body(schema: Schema, media_type: str = "application/json") -> dict[str, Any]:
    return {"requestBody": {"required": True, **_content(schema, media_type)}}


def _query(**schemas: Schema) -> list[Schema]:
    return [{"in": "query", "name": name, "schema": schema} for name, schema in schemas.items()]


def _path(name: str) -> list[Schema]:
    return [{"in": "path", "name": name, "required": True, "schema": {"type": "string", "minLength": 1}}]


_LIMIT: Schema = {"type": "integer", "minimum": 1, "maximum": 100}
_FILE = _content(_TEXT, "application/jsonl")
OPENAI_PATHS: Mapping[str, Schema] = {
    f"{PREFIX}/models": {
        "get": _operation("List the models", _all(object={"const": "list"}, data=_list(_ref("Model"))))
    },
    f"{PREFIX}/models/{{model}}": {
        "get": _operation("Get a model", _ref("Model"), parameters=_path("model"))
    },
    f"{PREFIX}/completions": {
        "post": _operation("Continue text", _ref("Completion"), stream=True, **_body(_COMPLETION))
    },
    f"{PREFIX}/chat/completions": {
        "post": _operation("Continue a conversation", _ref("ChatCompletion"), stream=True, **_body(_CHAT))
    },
    f"{PREFIX}/files": {
        "get": _operation(
            "List your files",
            _page("File"),
            parameters=_query(limit=_LIMIT, after=_TEXT, order={"enum": ["asc", "desc"]}, purpose=_TEXT),
        ),
        "post": _operation("Upload a file", _ref("File"), **_body(_UPLOAD, "multipart/form-data")),
    },
    f"{PREFIX}/files/{{file}}": {
        "get": _operation("Get a file", _ref("File"), parameters=_path("file")),
        "delete": _operation("Delete a file", _DELETED, parameters=_path("file")),
    },
    f"{PREFIX}/files/{{file}}/content": {
        "get": {
            **_operation("Download a file", _OBJECT, parameters=_path("file")),
            "responses": {
                "200": {"description": "The file.", **_FILE},
                "206": {"description": "The range of it.", **_FILE},
                "default": {"description": "What went wrong.", **_content(_ref("OpenAiError"))},
            },
        }
    },
    f"{PREFIX}/batches": {
        "get": _operation("List your batches", _page("Batch"), parameters=_query(limit=_LIMIT, after=_TEXT)),
        "post": _operation("Create a batch", _ref("Batch"), **_body(_NEW_BATCH)),
    },
    f"{PREFIX}/batches/{{batch}}": {
        "get": _operation("Get a batch", _ref("Batch"), parameters=_path("batch"))
    },
    f"{PREFIX}/batches/{{batch}}/cancel": {
        "post": _operation("Cancel a batch", _ref("Batch"), parameters=_path("batch"))
    },
}
