"""POST /datasets: the body is the file, which is passed on as it arrives."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from stillhouse.client.core.json_output import as_json
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import content_type, fill_from_query, invalid
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.upstream import Service
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2

CHUNK_BYTES = 512 * 1024
IDLE_S = 60.0
"""Time in which the next bytes of the body must arrive."""
MEDIA_TYPE = "application/octet-stream"


async def upload_dataset(context: WebContext, request: Request) -> Response:
    """Stores the body under `file_name`, as the next version of `dataset_id` if that is given."""
    caller = context.callers.of(request)
    if content_type(request) != MEDIA_TYPE:
        raise invalid(
            "", f"the content type is {content_type(request)[:80]!r}; send {MEDIA_TYPE}, the file itself."
        )
    first = run_pb2.UploadDatasetRequest()
    fill_from_query(first, request.query_params, hidden=("data",))
    limit = context.settings.max_upload_bytes
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and len(length) < 20 and int(length) > limit:
        raise _too_large(limit)
    service = context.upstream.trainer
    await caller.check(service)
    call = service.upload("UploadDataset", caller.token)
    try:
        stored = await _send(service, call, first, request, limit)
    finally:
        call.cancel()
    location = {"location": f"/api/v1/{stored.dataset.name or stored.name}"}
    return JsonResponse(as_json(stored), 201, headers=location)


async def _send(
    service: Service, call: Any, first: run_pb2.UploadDatasetRequest, request: Request, limit: int
) -> run_pb2.UploadDatasetResponse:
    try:
        await call.write(first)
        size = 0
        chunks = request.stream()
        while chunk := await _next(chunks):
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            for start in range(0, len(chunk), CHUNK_BYTES):
                data = chunk[start : start + CHUNK_BYTES]
                await call.write(run_pb2.UploadDatasetRequest(data=data))
        await call.done_writing()
        stored: run_pb2.UploadDatasetResponse = await call
    except asyncio.InvalidStateError:  # the service has ended the call: it says why
        stored = await _outcome(service, call)
    except grpc.RpcError as error:
        raise service.error(error) from error
    return stored


async def _outcome(service: Service, call: Any) -> run_pb2.UploadDatasetResponse:
    try:
        stored: run_pb2.UploadDatasetResponse = await call
    except grpc.RpcError as error:
        raise service.error(error) from error
    return stored


async def _next(chunks: Any) -> bytes:
    """The next bytes of a body that are any; empty at its end. Raises StillhouseError: CALL_TIMEOUT, CANCELLED."""
    try:
        async with asyncio.timeout(IDLE_S):
            async for chunk in chunks:
                if chunk:
                    data: bytes = chunk
                    return data
    except TimeoutError:
        raise StillhouseError(
            Reason.CALL_TIMEOUT, f"No byte of the file arrived for {IDLE_S:.0f} s; send it again."
        ) from None
    except ClientDisconnect:
        raise StillhouseError(Reason.CANCELLED, "The caller hung up.") from None
    return b""


def _too_large(limit: int) -> StillhouseError:
    return StillhouseError(
        Reason.MESSAGE_TOO_LARGE,
        f"The file is larger than the {limit} bytes that this server takes; use `stillhouse data push`, or start it with a "
        "larger --max-upload-bytes.",
    )
