"""Errors of the catalogue as problem documents (RFC 9457) with an HTTP status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grpc import StatusCode
from starlette.responses import Response

from stillhouse.client.core.errors import explain
from stillhouse.client.core.json_output import dumps, violations_as_json
from stillhouse.protos.errors import CATALOG, Reason, StillhouseError

MEDIA_TYPE = "application/problem+json"
ERRORS_PATH = "/api/v1/errors"
"""Below it each reason has a page, which the `type` of a problem names."""
_STATUS: Mapping[StatusCode, int] = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.NOT_FOUND: 404,
    StatusCode.FAILED_PRECONDITION: 409,
    StatusCode.ALREADY_EXISTS: 409,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.UNIMPLEMENTED: 501,
    StatusCode.DEADLINE_EXCEEDED: 504,
    StatusCode.OUT_OF_RANGE: 400,
    StatusCode.DATA_LOSS: 500,
    StatusCode.ABORTED: 503,
    StatusCode.CANCELLED: 503,
    StatusCode.INTERNAL: 500,
}
_STATUS_OF_REASON: Mapping[Reason, int] = {
    Reason.DISK_FULL: 507,
    Reason.OUT_OF_MEMORY: 507,
    Reason.MESSAGE_TOO_LARGE: 413,
}


def http_status(reason: Reason) -> int:
    """The HTTP status of a reason."""
    code = next(code for code, reasons in CATALOG.items() if reason in reasons)
    return _STATUS_OF_REASON.get(reason, _STATUS[code])


def problem_of(error: StillhouseError, status: int | None = None) -> dict[str, Any]:
    """The problem document of `error`: RFC 9457's members, and reason, remedy, violations, metadata, retry_after_s."""
    title, remedy = explain(error.reason)
    problem: dict[str, Any] = {
        "type": f"{ERRORS_PATH}/{error.reason}",
        "title": title,
        "status": status or http_status(error.reason),
        "detail": error.message,
        "reason": str(error.reason),
        "remedy": remedy,
    }
    if error.violations:
        problem["violations"] = violations_as_json(error)
    if error.metadata:
        problem["metadata"] = dict(error.metadata)
    if error.retry_after_s is not None:
        problem["retry_after_s"] = error.retry_after_s
    return problem


def problem_response(error: StillhouseError, status: int | None = None) -> Response:
    """The response to a request that failed with `error`."""
    problem = problem_of(error, status)
    headers = error_headers(error, problem["status"])
    return JsonResponse(problem, problem["status"], headers=headers, media_type=MEDIA_TYPE)


def error_headers(error: StillhouseError, status: int) -> dict[str, str]:
    """Retry-After and WWW-Authenticate, where the error calls for them."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


class JsonResponse(Response):
    """A JSON document; NaN and infinities are strings, and text that is no Unicode is replaced."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The document as UTF-8."""
        return dumps(content).encode("utf-8", "replace")


def not_found(path: str) -> StillhouseError:
    """The error of a path that has no route."""
    return StillhouseError(
        Reason.NOT_FOUND, f"there is no {path[:200]!r} here; /api/v1/openapi.json lists every path."
    )
