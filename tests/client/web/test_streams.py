"""Server-sent events: no reader misses an event, whenever it comes and however often it leaves."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.client.core.settings import Settings
from stillhouse.client.web.app import web_app
from stillhouse.client.web.settings import WebSettings
from stillhouse.client.web.streams import shared
from stillhouse.client.web.streams.shared import Item, Items, SharedStream, SharedStreams, read
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.tokens import Scope, create, revoke
from tests.client.web.conftest import start_web
from tests.student_trainer.runs.api.caller import model_of_no_kind
from tests.support.processes import no_process_left
from tests.support.programs import start_trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    id: str
    kind: str
    data: str


def events_of(lines: Iterator[str]) -> Iterator[Event]:
    """Parses server-sent events."""
    fields: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line and name:
            fields.setdefault(name, []).append(value)
        elif not line and "event" in fields:
            data = "\n".join(fields.get("data", ()))
            yield Event(id=fields.get("id", [""])[0], kind=fields["event"][0], data=data)
            fields = {}
        elif not line:
            fields = {}


def token_of(data: Path, name: str) -> str:
    """A new token of the service."""
    return create(data / "tokens.json", name=name, scopes=[Scope.SUBMIT], lifetime_s=None)[0]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and data directory of a run service with tokens."""
    root = tmp_path_factory.mktemp("waiting")
    data = root / "data"
    data.mkdir()
    token_of(data, "ada")
    with (
        no_process_left() as mark,
        start_trainer(
            data, directory=root, options=["--stop-runs-on-exit", "--stop-grace-s", "0"], environment=mark
        ) as trainer,
    ):
        yield trainer.target, data


@pytest.fixture(scope="module")
def waiting(service: tuple[str, Path]) -> Iterator[tuple[httpx.Client, str]]:
    """A caller of the run service, and the path of a run in its queue behind one that never moves."""
    target, data = service
    root = data.parent
    (root / "rows.jsonl").write_text('{"text": "a"}\n')
    spec = {
        "student": {"model": str(model_of_no_kind(root))},
        "data": {"train": [{"path": str(root / "rows.jsonl")}]},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
    }
    with (
        no_process_left() as mark,
        start_web(root, target, environment=mark) as web,
        httpx.Client(base_url=web.target, headers=bearer(token_of(data, "bob")), timeout=60) as client,
    ):
        first = client.post("/api/v1/runs", json={"spec": spec}).json()["name"]
        process = data / first / "process.json"
        while not process.exists():
            time.sleep(0.02)
        pid = json.loads(process.read_text())["pid"]
        os.kill(pid, signal.SIGSTOP)  # it has the only slot
        created = client.post("/api/v1/runs", json={"spec": spec})
        yield client, created.headers["location"]
        client.post(f"{created.headers['location']}:stop")
        os.kill(pid, signal.SIGKILL)


def turn(client: httpx.Client, run: str) -> None:
    """Makes two events: the run leaves the queue, and comes back."""
    assert client.post(f"{run}:stop").status_code == 200
    assert client.post(f"{run}:resume").status_code == 200


def test_a_reader_that_slept_catches_up_without_a_gap(waiting: tuple[httpx.Client, str]) -> None:
    client, run = waiting
    with client.stream("GET", f"{run}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first = next(events_of(response.iter_lines()))
        assert (first.kind, '"state": "PENDING"' in first.data) == ("run", True)
        before = int(first.id)
    for _ in range(5):
        turn(client, run)
    with client.stream("GET", f"{run}/events") as live:  # the window of the others begins here
        newest = int(next(events_of(live.iter_lines())).id)
        assert newest == before + 10
        for last in (before, newest - 3):
            headers = {"last-event-id": str(last)}
            with client.stream("GET", f"{run}/events", headers=headers) as response:
                events = events_of(response.iter_lines())
                seen = [int(next(events).id) for _ in range(newest - last)]
            assert seen == list(range(last + 1, newest + 1))


def test_a_stream_ends_with_its_run_and_stays_ended(waiting: tuple[httpx.Client, str]) -> None:
    client, run = waiting
    with (
        client.stream("GET", f"{run}/events") as response,
        client.stream("GET", f"{run}/logs", params={"follow": "true"}) as log,
    ):
        assert client.post(f"{run}:stop").status_code == 200
        *_, last = events_of(response.iter_lines())
        assert last.kind == "end"
        assert [each.kind for each in events_of(log.iter_lines())] == ["end"]
    again = client.get(f"{run}/events", headers={"last-event-id": last.id})
    assert (again.status_code, again.content) == (204, b"")
    assert client.post(f"{run}:resume").status_code == 200


def test_sequence_0_is_the_present_state(waiting: tuple[httpx.Client, str]) -> None:
    client, run = waiting
    for given in ({"params": {"after_sequence": "0"}}, {"headers": {"last-event-id": "0"}}):
        with client.stream("GET", f"{run}/events", timeout=10, **given) as response:  # type: ignore[arg-type]
            assert next(events_of(response.iter_lines())).kind == "run"


async def test_a_revoked_token_ends_its_own_readers_alone(
    waiting: tuple[httpx.Client, str], service: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "READER_CHECK_S", 0.2)
    monkeypatch.setattr(shared, "HEARTBEAT_S", 0.2)
    client, run = waiting
    target, data = service
    async with web_app(WebSettings(services=Settings(trainer=target))) as app:

        def follow(token: str) -> tuple[asyncio.Task[None], asyncio.Queue[str]]:
            """Reads the events of the run to their end."""
            parts: asyncio.Queue[str] = asyncio.Queue()

            async def send(message: MutableMapping[str, Any]) -> None:
                parts.put_nowait(message.get("body", b"").decode())

            scope = {
                "type": "http",
                "method": "GET",
                "path": f"{run}/events",
                "query_string": b"",
                "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {token}".encode())],
            }
            serving = app.asgi(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
            return asyncio.create_task(serving), parts

        async def until(parts: asyncio.Queue[str], text: str) -> None:
            while text not in (part := await parts.get()):
                assert "event: problem" not in part, part

        async with asyncio.timeout(60):
            eve, eves = follow(token_of(data, "eve"))
            await until(eves, "event: run")
            other, others = follow(token_of(data, "mallory"))
            await until(others, "event: run")
            revoke(data / "tokens.json", "eve")
            await until(eves, "UNAUTHENTICATED")
            await eve
            assert (await asyncio.to_thread(client.post, f"{run}:stop")).status_code == 200
            await until(others, "event: run")
            await until(others, "event: end")
            await other
    assert client.post(f"{run}:resume").status_code == 200


async def test_a_stream_that_has_ended_is_made_anew_beside_a_slow_reader() -> None:
    """As when a run is resumed."""

    async def source(_behind: int) -> Items:
        yield Item(0, 0, None, b"")

    streams = SharedStreams()
    async with streams.reader("a", "key", lambda: SharedStream(source, tail=0)) as slow:
        while not slow.ended:
            await slow.changed(1.0)
        async with streams.reader("b", "key", lambda: SharedStream(source, tail=0)) as fresh:
            assert fresh is not slow
    await streams.close()


async def test_readers_of_any_speed_read_each_item_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is a generator that breaks now and then; the window holds a few items."""
    monkeypatch.setattr(shared, "WINDOW_ITEMS", 8)
    monkeypatch.setattr(shared, "RETRIES_S", (0.001,))
    monkeypatch.setattr(shared, "ITEMS_AT_ONCE", 5)
    rng = random.Random(1)
    total = 300
    written = 0

    async def source(behind: int) -> Items:
        position = behind or written
        yield Item(position, position, None, b"")
        while position < total:
            if rng.random() < 0.02:
                raise StillhouseError(Reason.SERVICE_UNREACHABLE, "lost")
            if position < written:
                position += 1
                yield Item(position - 1, position, None, b"%d" % position)
            else:
                await asyncio.sleep(0.0005)

    async def writer() -> None:
        nonlocal written
        while written < total:
            written += rng.randrange(4)
            written = min(written, total)
            await asyncio.sleep(0.001)

    async def allowed() -> None: ...

    streams = SharedStreams()

    async def reader(cursor: int, pause_s: float) -> list[int]:
        seen = []
        async with streams.reader("client", "key", lambda: SharedStream(source, tail=0)) as stream:
            options: Any = {
                "direct": reliable,
                "cut": lambda *_: b"",
                "heartbeat": b"",
                "is_over": lambda: False,
                "check": allowed,
            }
            async for each in read(streams, stream, cursor, **options):
                if each.isdigit():
                    seen.append(int(each))
                await asyncio.sleep(pause_s * rng.random())
        return seen

    async def reliable(behind: int) -> AsyncGenerator[Item, None]:
        for position in range(behind, written):
            yield Item(position, position + 1, None, b"%d" % (position + 1))

    written = 20
    readers = [reader(cursor, pause_s) for cursor in (0, 7, 20) for pause_s in (0.0, 0.004)]
    seen = await asyncio.gather(*readers, writer())
    for cursor, each in zip((0, 0, 7, 7, 20, 20), seen, strict=False):
        assert each == list(range(cursor + 1, total + 1))
    await streams.close()
