"""POST /datasets: the body is the file, which is passed on as it arrives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import grpc
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import as_json
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import content_type, fill_from_query, invalid, next_chunk
from stillhouse.client.web.problems import JsonResponse
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2

CHUNK_BYTES = 512 * 1024
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
    body = _Body(request, first, limit)
    call = service.upload("UploadDataset", body.requests(), caller.token)
    try:
        stored = await body.outcome(call)
    except grpc.RpcError as error:
        raise service.error(error) from error
    location = {"location": f"/api/v1/{stored.dataset.name or stored.name}"}
    return JsonResponse(as_json(stored), 201, headers=location)


class _Body:
    """The body of a request as requests of the call, which a thread of gRPC takes as fast as the service reads them."""

    def __init__(self, request: Request, first: run_pb2.UploadDatasetRequest, limit: int) -> None:
        self._chunks = request.stream()
        self._first, self._limit = first, limit
        self._loop = asyncio.get_running_loop()
        self._call: Any = None
        self._waiting: Future[bytes] | None = None
        self._over = threading.Event()
        self._error: StillhouseError | None = None

    async def outcome(self, call: Any) -> run_pb2.UploadDatasetResponse:
        """The response of the call. Raises what the body, else what the call ended with; nothing is left running."""
        ended = asyncio.Event()
        self._call = call
        call.add_done_callback(lambda _call: self._loop.call_soon_threadsafe(ended.set))
        try:
            await ended.wait()
        finally:
            self._over.set()
            call.cancel()
            if self._waiting is not None:
                self._waiting.cancel()
        if self._error is not None:
            raise self._error
        stored: run_pb2.UploadDatasetResponse = call.result()
        return stored

    def requests(self) -> Iterator[run_pb2.UploadDatasetRequest]:
        """Blocks for each; an error of the body cancels the call, so that the part that has arrived is not stored."""
        yield self._first
        size = 0
        while not self._over.is_set():
            self._waiting = asyncio.run_coroutine_threadsafe(next_chunk(self._chunks), self._loop)
            try:
                chunk = self._waiting.result()
                size += len(chunk)
                if size > self._limit:
                    raise _too_large(self._limit)
            except CancelledError:
                return
            except StillhouseError as error:
                self._error = error
                self._call.cancel()
                return
            if not chunk:
                return
            for start in range(0, len(chunk), CHUNK_BYTES):
                yield run_pb2.UploadDatasetRequest(data=chunk[start : start + CHUNK_BYTES])


def _too_large(limit: int) -> StillhouseError:
    return StillhouseError(
        Reason.MESSAGE_TOO_LARGE,
        f"The file is larger than the {limit} bytes that this server takes; use `stillhouse data push`, or start it with a "
        "larger --max-upload-bytes.",
    )
