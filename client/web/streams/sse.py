"""Server-sent events: frames, and the response that sends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stillhouse.client.core.json_output import dumps
from stillhouse.client.web.problems import problem_of
from stillhouse.protos.errors import StillhouseError, from_status, to_status

MEDIA_TYPE = "text/event-stream"
HEARTBEAT = b": still here\n\n"
RETRY_MS = 2000
SEND_TIMEOUT_S = 60.0
"""A reader that takes nothing for so long is gone; it resumes with Last-Event-ID."""


def frame(event: str, data: str, event_id: str = "") -> bytes:
    """One event. Line ends within `data`, of any kind, become its own `data:` lines, which readers join with "\\n"."""
    lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    head = f"id: {event_id}\n" if event_id else ""
    body = "".join(f"data: {line}\n" for line in lines)
    return f"{head}event: {event}\n{body}\n".encode("utf-8", "replace")


def json_frame(event: str, document: object, event_id: str = "") -> bytes:
    """One event with a JSON document on one line."""
    return frame(event, dumps(document), event_id)


def problem_frame(error: StillhouseError) -> bytes:
    """The event `problem`, with the document of `error`."""
    return json_frame("problem", problem_of(error))


BEGIN = f"retry: {RETRY_MS}\n\n".encode()
"""First bytes of a stream whose reader connects again by itself."""


class EventStream(Response):
    """Sends the frames of a generator, and closes it when the reader goes away.

    `first` has been taken from it, so that an error before it has an HTTP status. A later error becomes the frame that
    `failure` makes of it.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        first: bytes,
        frames: AsyncGenerator[bytes, None],
        failure: Callable[[StillhouseError], bytes] = problem_frame,
    ) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._frames, self._failure = first, frames, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Sends until the generator ends or the reader is gone."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.wait({sending, gone})
        with contextlib.suppress(asyncio.CancelledError, TimeoutError, OSError):
            sending.result()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._frames):
            await _send(send, self._first)
            try:
                async for each in self._frames:
                    await _send(send, each)
            except Exception as error:
                await _send(send, self._failure(from_status(to_status(error))))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, body: bytes) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def disconnected(receive: Receive) -> None:
    """Waits until the caller, whose body has been read, is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(frames: AsyncGenerator[bytes, None]) -> Response:
    """The response that streams `frames`: 204, which ends a browser's retries, if there are none.

    Raises what the generator raises before its first frame.
    """
    first = await anext(frames, None)
    return Response(status_code=204) if first is None else EventStream(BEGIN + first, frames)
