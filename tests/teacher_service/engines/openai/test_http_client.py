"""HTTP to an upstream server that fails, limits, redirects and never ends; the key is shown nowhere."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.engines.openai import http_client
from stillhouse.teacher_service.engines.openai.credentials import Upstream
from stillhouse.teacher_service.engines.openai.http_client import HttpClient, Request
from tests.support.networks.http_server import HttpServer, Received, Reply, http_server

KEY = "sk-very-secret-0123456789"
ASK = Request(path="/v1/x", body={"a": 1}, max_bytes=10_000)


@asynccontextmanager
async def client_of(server: HttpServer, **options: Any) -> AsyncIterator[HttpClient]:
    options = {"concurrency": 4, "timeout_s": 5.0, **options}
    client = HttpClient(Upstream(url=server.url, key=KEY), **options)
    try:
        yield client
    finally:
        await client.close()


def in_turn(*replies: Reply) -> Callable[[Received], Reply]:
    """Gives one reply after the other, and the last for ever."""
    rest = itertools.chain(replies, itertools.repeat(replies[-1]))
    return lambda request: next(rest)


async def error_of(server: HttpServer, **options: Any) -> StillhouseError:
    async with client_of(server, **options) as client:
        with pytest.raises(StillhouseError) as caught:
            await client.post(ASK)
    assert KEY not in f"{caught.value.message}{caught.value!r}{client.upstream!r}"
    return caught.value


async def test_a_proxy_of_the_environment_does_not_see_a_key_over_http(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with http_server(in_turn(Reply(body=2))) as proxy, http_server(in_turn(Reply(body=1))) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        async with client_of(server) as client:
            assert await client.post(ASK) == 1
    assert not proxy.requests


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_a_passing_failure_is_tried_again_after_the_time_that_the_server_names(status: int) -> None:
    headers = {"Retry-After": "0.3"}
    with http_server(in_turn(Reply(status=status, headers=headers), Reply(body={"ok": 1}))) as server:
        async with client_of(server) as client:
            begin = time.monotonic()
            assert await client.post(ASK) == {"ok": 1}
    assert time.monotonic() - begin >= 0.3
    assert len(server.requests) == 2
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_a_rate_limit_holds_back_all_requests() -> None:
    with http_server(in_turn(Reply(status=429, headers={"Retry-After": "0.4"}), Reply(body=1))) as server:
        async with client_of(server) as client:
            first = asyncio.create_task(client.post(ASK))
            assert await asyncio.to_thread(server.asked.wait, 10)
            await asyncio.sleep(0.1)  # the refusal arrives
            begin = time.monotonic()
            await client.post(ASK)
            assert time.monotonic() - begin > 0.1
            await first


@pytest.mark.parametrize("is_date", [False, True])
async def test_a_wait_beyond_the_timeout_is_handed_to_the_caller(is_date: bool) -> None:
    told = formatdate(time.time() + 86400, usegmt=True) if is_date else "86400"
    with http_server(in_turn(Reply(status=429, headers={"Retry-After": told}))) as server:
        error = await error_of(server)
    assert error.reason is Reason.TEACHER_UNREACHABLE
    assert error.retry_after_s == pytest.approx(86400, abs=60)
    assert len(server.requests) == 1


async def test_a_lasting_failure_ends_after_some_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "FIRST_DELAY_S", 0.001)
    with http_server(in_turn(Reply(status=500, body={"error": {"message": "out of\n luck"}}))) as server:
        error = await error_of(server)
    assert error.reason is Reason.TEACHER_UNREACHABLE
    assert error.retryable
    assert "500: out of luck" in error.message
    assert len(server.requests) == http_client.MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("status", "reason", "part"),
    [
        (301, Reason.INVALID_CONFIG, "redirects"),
        (307, Reason.INVALID_CONFIG, "redirects"),
        (401, Reason.INVALID_CONFIG, "--upstream-key-file"),
        (403, Reason.INVALID_CONFIG, "--upstream-key-file"),
        (404, Reason.INVALID_CONFIG, "404"),
        (400, Reason.INVALID_REQUEST, "top_k of *** is too large"),
        (422, Reason.INVALID_REQUEST, "422"),
    ],
)
async def test_a_refusal_is_final_and_quotes_the_server_without_the_key(
    status: int, reason: Reason, part: str
) -> None:
    with http_server(in_turn(Reply(body="stolen"))) as elsewhere:
        body = {"error": {"message": f"top_k of {KEY} is too large"}}
        headers = {"Location": elsewhere.url}
        with http_server(in_turn(Reply(status=status, body=body, headers=headers))) as server:
            error = await error_of(server)
        assert not elsewhere.requests, "a redirect was followed"
    assert error.reason is reason
    assert part in error.message
    assert len(server.requests) == 1


def endless(part: bytes) -> Iterator[bytes]:
    return itertools.repeat(part)


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (Reply(body=endless(b" " * 1000)), "more than the 10000 bytes"),
        (Reply(body=b"x" * 10_001), "more than the 10000 bytes"),
        (Reply(body=b"<html>"), "not JSON"),
        (Reply(body=b"[" * 9_000), "not JSON"),
        (Reply(body=b'"' + b"\xff" * 8), "not JSON"),
        (Reply(body=b"{}", headers={"Content-Encoding": "gzip"}), "compressed"),
    ],
)
async def test_bodies_that_cannot_be_right_are_refused(reply: Reply, part: str) -> None:
    with http_server(in_turn(reply)) as server:
        error = await error_of(server)
    assert error.reason is Reason.TENSOR_INVALID
    assert part in error.message
    assert len(server.requests) == 1


async def test_an_endless_error_is_cut_and_a_silent_server_times_out() -> None:
    with http_server(in_turn(Reply(status=400, body=endless(b"x" * 1000)))) as server:
        assert "400" in (await error_of(server)).message

    def silent() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1.5)

    with http_server(in_turn(Reply(body=silent()))) as server:
        error = await error_of(server, timeout_s=1.0)
    assert error.reason is Reason.TEACHER_UNREACHABLE


async def test_a_cancelled_request_leaves_the_server_and_frees_its_place() -> None:
    def slow() -> Iterator[bytes]:
        while True:
            yield b" " * 100
            time.sleep(0.01)

    ask = Request(path="/", body={}, max_bytes=1 << 30)
    with http_server(lambda request: Reply(body=slow() if len(server.requests) == 1 else 7)) as server:
        async with client_of(server, concurrency=1) as client:
            task = asyncio.create_task(client.post(ask))
            assert await asyncio.to_thread(server.asked.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await client.post(ask) == 7
        assert await asyncio.to_thread(server.left.wait, 10)


async def test_a_stream_is_tried_again_only_before_its_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "FIRST_DELAY_S", 0.001)
    whole = iter([b': ping\n\ndata: {"a"', b": ", b"1}\r\n\r\ndata: [DONE]\n\n"])
    with http_server(
        in_turn(Reply(status=502), Reply(body=iter([b": ping\n"])), Reply(body=whole))
    ) as server:
        async with client_of(server) as client:
            assert [event async for event in client.stream(ASK)] == [{"a": 1}]
        assert len(server.requests) == 3
    with http_server(lambda request: Reply(body=iter([b"data: 1\n\n"]))) as server:
        async with client_of(server) as client:
            events = client.stream(ASK)
            assert await anext(events) == 1
            with pytest.raises(StillhouseError, match="ended a stream") as caught:
                await anext(events)
        assert len(server.requests) == 1
        assert caught.value.reason is Reason.TEACHER_UNREACHABLE


async def test_an_absent_server_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "FIRST_DELAY_S", 0.001)
    with http_server(in_turn(Reply())) as server:
        pass
    error = await error_of(server)
    assert error.reason is Reason.TEACHER_UNREACHABLE
    assert server.url in error.message
