"""GET and HEAD of an artifact, with ranges and entity tags; streamed, and checked against its SHA-256."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2

MEDIA_TYPE = "application/octet-stream"
LIST_TIMEOUT_S = 600.0
"""The service hashes each new file once."""
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def artifact(context: WebContext, request: Request) -> Response:
    """The file, or the one range of it that is asked for."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    name, path = f"runs/{request.path_params['run']}", request.path_params["path"]
    found = await _find(context, caller, name, path)
    tag = f'"{found.sha256}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": tag,
        "cache-control": "private, no-cache",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
    }
    if tag in [each.strip() for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    span = _range_of(request, found.size_bytes, tag)
    if span is None:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{found.size_bytes}"})
    start, end, is_part = span
    headers["content-length"] = str(end - start)
    if is_part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{found.size_bytes}"
    status = 206 if is_part else 200
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=headers, media_type=MEDIA_TYPE)
    content = _content(context, caller, name, found, start=start, end=end)
    return StreamingResponse(content, status_code=status, headers=headers, media_type=MEDIA_TYPE)


async def _find(context: WebContext, caller: Caller, name: str, path: str) -> run_pb2.Artifact:
    request = run_pb2.ListArtifactsRequest(name=name)
    listed = await caller.call(context.upstream.trainer, "ListArtifacts", request, timeout_s=LIST_TIMEOUT_S)
    for each in listed.artifacts:
        if each.path == path:
            found: run_pb2.Artifact = each
            return found
    raise StillhouseError(
        Reason.ARTIFACT_NOT_FOUND,
        f"The run has no file {path[:200]!r}; the list of artifacts shows what it has.",
    )


def _range_of(request: Request, size: int, tag: str) -> tuple[int, int, bool] | None:
    """First byte and end of what is asked for, and whether it is a range; None if the file has no such bytes.

    Everything else than one range, or one of another version of the file, asks for the whole file.
    """
    match = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if match is None or request.headers.get("if-range", tag) != tag or match.groups() == ("", ""):
        return 0, size, False
    first, last = match.groups()
    if not first:
        return (max(0, size - int(last)), size, True) if int(last) and size else None
    if int(first) >= size or (last and int(last) < int(first)):
        return None
    return int(first), min(size, int(last) + 1) if last else size, True


async def _content(
    context: WebContext, caller: Caller, name: str, found: run_pb2.Artifact, *, start: int, end: int
) -> AsyncGenerator[bytes, None]:
    """The bytes in [start, end). An error cuts the connection short of the length that the headers promise."""
    request = run_pb2.DownloadArtifactRequest(name=name, path=found.path, start_offset=start)
    async with aclosing(caller.stream(context.upstream.trainer, "DownloadArtifact", request)) as chunks:
        async for chunk in chunks:
            if chunk.sha256 and chunk.sha256 != found.sha256:
                raise StillhouseError(
                    Reason.CHECKPOINT_CORRUPT, f"{found.path} changed while it was read; load it again."
                )
            data = chunk.data[: end - start]
            start += len(data)
            yield data
            if start >= end:
                return
