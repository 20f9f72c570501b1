"""Errors of the catalogue in OpenAI's form: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from stillhouse.client.web.problems import JsonResponse, error_headers, http_status
from stillhouse.protos.errors import Reason, StillhouseError

PREFIX = "/v1"
"""Prefix of the paths whose errors have this form."""
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def status_of(error: StillhouseError) -> int:
    """The HTTP status of `error`. A missing ability is 400: clients send what answers 501 again."""
    return 400 if error.reason is Reason.CAPABILITY else http_status(error.reason)


def error_body(error: StillhouseError, status: int | None = None) -> dict[str, Any]:
    """The document of `error`: `code` is the reason, `param` the first field that is wrong."""
    status = status or status_of(error)
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            "param": error.violations[0].field if error.violations else None,
            "code": str(error.reason),
        }
    }


def error_response(error: StillhouseError, status: int | None = None) -> Response:
    """The response to a request that failed with `error`."""
    status = status or status_of(error)
    return JsonResponse(error_body(error, status), status, headers=error_headers(error, status))


def error_frame(error: StillhouseError) -> bytes:
    """The event of a stream that failed with `error`."""
    return data_frame(error_body(error))


def data_frame(document: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(document, allow_nan=False).encode() + b"\n\n"
