"""HTTP to the upstream server: bounded bodies, retries with backoff, rate limits, no redirects."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.engines.openai.credentials import Upstream

CONNECT_TIMEOUT_S = 10.0
MAX_ATTEMPTS = 6
"""Tries of a request; those that a rate limit refused do not count, and end with the timeout."""
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 30.0
"""Range of the delay before another try, which doubles."""
MAX_ERROR_BYTES = 64 << 10
"""Bytes of an error that are read."""
MAX_ERROR_CHARS = 300
"""Characters of the upstream server's own sentence that are quoted."""
_RATE_LIMITED = frozenset({429, 503, 529})
_TRANSIENT = _RATE_LIMITED | {408, 425, 500, 502, 504}
_LARGE_JSON_BYTES = 1 << 18


class UpstreamRefusalError(StillhouseError):
    """An answer of the upstream server that another try would not change."""

    def __init__(self, reason: Reason, message: str, status: int) -> None:
        super().__init__(reason, message)
        self.status = status
        """Its HTTP status."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A POST to the upstream server."""

    path: str
    """Such as "/v1/completions"."""
    body: dict[str, Any]
    """Sent as JSON."""
    max_bytes: int
    """Largest answer that is read."""


class _TransientError(Exception):
    def __init__(self, error: StillhouseError, *, wait_s: float | None = None, counts: bool = True) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait_s = wait_s
        self.counts = counts


class _Retries:
    """Further tries of one request: how many are left, and until when, counted from the first failure."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline_s: float | None = None
        self._tried = 0
        self._delay_s = FIRST_DELAY_S

    async def wait(self, failure: _TransientError) -> None:
        """Sleeps until the next try; raises the failure's error if there is none."""
        now_s = time.monotonic()
        self._deadline_s = self._deadline_s or now_s + self._timeout_s
        self._tried += failure.counts
        delay_s = self._delay_s * (0.5 + random.random() / 2)  # noqa: S311 - spreads tries, hides nothing
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)
        delay_s = max(delay_s, failure.wait_s or 0.0)
        if self._tried >= MAX_ATTEMPTS or now_s + delay_s > self._deadline_s:
            raise failure.error from failure
        await asyncio.sleep(delay_s)


class HttpClient:
    """Client of one upstream server; at most `concurrency` requests are under way."""

    def __init__(self, upstream: Upstream, *, concurrency: int, timeout_s: float) -> None:
        """`timeout_s` bounds one try, the time of all further ones, and the silence in a stream."""
        # They log addresses of requests and headers of answers.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.upstream = upstream
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._open_at_s = 0.0
        headers = {"Accept-Encoding": "identity", "User-Agent": "stillhouse-teacher"}
        if upstream.key:
            headers["Authorization"] = f"Bearer {upstream.key}"
        self._client = httpx.AsyncClient(
            base_url=upstream.url,
            headers=headers,
            follow_redirects=False,
            # A proxy of the environment would read what goes over http, the key too; https goes through its tunnel.
            trust_env=upstream.url.startswith("https:"),
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            # GETs, which are few, wait for no place.
            limits=httpx.Limits(max_connections=concurrency + 4, max_keepalive_connections=concurrency),
        )

    async def close(self) -> None:
        """Closes all connections, which cancels their requests."""
        await self._client.aclose()

    async def get(self, path: str, *, max_bytes: int = 1 << 20, timeout_s: float | None = None) -> Any:
        """The JSON at `path`. Raises `StillhouseError` as `post`."""
        return await self._whole("GET", path, None, max_bytes, timeout_s or self._timeout_s)

    async def post(self, request: Request) -> Any:
        """The JSON that answers the request.

        Raises:
            StillhouseError: INVALID_REQUEST where the server refuses it; INVALID_CONFIG for a key, a model or a path that it
                does not know; TENSOR_INVALID for an answer that is too large or not JSON; TEACHER_UNREACHABLE.
        """
        return await self._whole("POST", request.path, request.body, request.max_bytes, self._timeout_s)

    async def stream(self, request: Request) -> AsyncGenerator[Any]:
        """Yields the JSON of each event, until `[DONE]`. It is tried again only while there is none.

        Raises `StillhouseError` as `post`.
        """
        retries, begun = _Retries(self._timeout_s), False
        while True:
            try:
                async with aclosing(self._events(request)) as events:
                    async for event in events:
                        begun = True
                        yield event
            except _TransientError as failure:
                if begun:
                    raise failure.error from failure
                await retries.wait(failure)
            else:
                return

    async def _whole(self, method: str, path: str, body: Any, max_bytes: int, timeout_s: float) -> Any:
        retries = _Retries(timeout_s)
        while True:
            try:
                async with (
                    self._turn(method),
                    asyncio.timeout(timeout_s),
                    self._response(method, path, body) as response,
                ):
                    content = b"".join([part async for part in self._parts(response, max_bytes)])
                return await self._parsed(content, path)
            except TimeoutError:
                raise self._unreachable(f"gives no complete answer in {timeout_s:g} s") from None
            except _TransientError as failure:
                await retries.wait(failure)

    async def _events(self, request: Request) -> AsyncGenerator[Any]:
        async with self._turn("POST"), self._response("POST", request.path, request.body) as response:
            rest: list[bytes] = []  # parts of a line
            async for part in self._parts(response, request.max_bytes):
                rest.append(part)
                if b"\n" not in part:
                    continue
                *lines, last = b"".join(rest).split(b"\n")
                rest = [last]
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield await self._parsed(data, request.path)
        raise _TransientError(self._unreachable("ended a stream before its end"))

    @asynccontextmanager
    async def _turn(self, method: str) -> AsyncIterator[None]:
        """Waits for a place and for the end of a rate limit; neither counts as time of the request."""
        async with self._slots if method == "POST" else nullcontext():
            await asyncio.sleep(max(0.0, self._open_at_s - time.monotonic()))
            yield

    @asynccontextmanager
    async def _response(self, method: str, path: str, body: Any) -> AsyncIterator[httpx.Response]:
        """A response with a status of success. Raises _TransientError, and UpstreamRefusalError."""
        try:
            async with self._client.stream(method, path, json=body) as response:
                if not response.is_success:
                    raise await self._failure(response, path)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise self._invalid("sends a compressed answer, which was not asked for")
                yield response
        except httpx.HTTPError as error:
            what = f"cannot be reached ({type(error).__name__})"
            raise _TransientError(
                self._unreachable(what, remedy="Start it, or correct --upstream.")
            ) from error
        except httpx.InvalidURL as error:
            raise self._invalid("has an address that is not valid") from error

    async def _parts(self, response: httpx.Response, max_bytes: int) -> AsyncIterator[bytes]:
        read = 0
        async for part in response.aiter_raw(1 << 16):
            read += len(part)
            if read > max_bytes:
                raise self._invalid(f"sends more than the {max_bytes} bytes that its answer can have")
            yield part

    async def _failure(self, response: httpx.Response, path: str) -> Exception:
        status = response.status_code
        said = await self._sentence(response)
        if status in _TRANSIENT:
            wait_s = _retry_after_s(response.headers.get("retry-after", ""))
            limited = status in _RATE_LIMITED
            if limited and wait_s is not None and wait_s <= self._timeout_s:
                self._open_at_s = max(self._open_at_s, time.monotonic() + wait_s)
            error = self._unreachable(f"answers {status}{said}", retry_after_s=wait_s)
            return _TransientError(error, wait_s=wait_s, counts=not limited)
        if 300 <= status < 400:
            return UpstreamRefusalError(
                Reason.INVALID_CONFIG,
                f"{self.upstream.url}{path} redirects ({status}), and the key is sent nowhere else. Give --upstream the "
                "address that it leads to.",
                status,
            )
        if status in (401, 403):
            # A server's sentence on a key may quote it.
            what = "refuses the API key (401)" if status == 401 else f"forbids {path} (403){said}"
            return UpstreamRefusalError(
                Reason.INVALID_CONFIG,
                f"{self.upstream.url} {what}. Give a key that it takes by --upstream-key-file or STILLHOUSE_UPSTREAM_API_KEY.",
                status,
            )
        reason = Reason.INVALID_CONFIG if status in (404, 405, 501) else Reason.INVALID_REQUEST
        return UpstreamRefusalError(reason, f"{self.upstream.url}{path} answers {status}{said}.", status)

    async def _sentence(self, response: httpx.Response) -> str:
        """The server's words on an error, short, printable and without the key."""
        content = b""
        try:
            async for part in response.aiter_raw(1 << 14):
                content += part
                if len(content) > MAX_ERROR_BYTES:
                    break
            document = json.loads(content)
        except (httpx.HTTPError, ValueError, RecursionError):
            return ""
        for name in ("error", "message", "detail"):
            while isinstance(document, dict) and name in document:
                document = document[name]
        if not isinstance(document, str):
            return ""
        words = " ".join("".join(char if char.isprintable() else " " for char in document).split())
        words = self.upstream.redact(words)
        return f": {words[:MAX_ERROR_CHARS].rstrip('.')}" if words else ""

    async def _parsed(self, content: bytes, path: str) -> Any:
        try:
            if len(content) > _LARGE_JSON_BYTES:
                return await asyncio.to_thread(json.loads, content)
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._invalid(f"answers {path} with something that is not JSON") from error

    def _unreachable(
        self, what: str, *, retry_after_s: float | None = None, remedy: str = "Look into its log."
    ) -> StillhouseError:
        return StillhouseError(
            Reason.TEACHER_UNREACHABLE,
            f"The upstream server {self.upstream.url} {what}. {remedy}",
            retry_after_s=retry_after_s,
        )

    def _invalid(self, what: str) -> StillhouseError:
        return StillhouseError(
            Reason.TENSOR_INVALID,
            f"The upstream server {self.upstream.url} {what}. It may not be what --upstream means.",
        )


def _retry_after_s(value: str) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None without one."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None
