"""Webhooks: states in order, signed, until they are accepted, across a restart, and to allowed hosts alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import (
    CreateRunRequest,
    DeleteRunRequest,
    NotifySpec,
    Run,
    RunSpec,
)
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier
from stillhouse.student_trainer.runs.webhooks import delivery, notifier
from stillhouse.student_trainer.runs.webhooks.delivery import DeliveryError, post
from stillhouse.student_trainer.runs.webhooks.hosts import WebhookHost, WebhookHosts
from stillhouse.student_trainer.runs.webhooks.notifier import Webhooks
from tests.student_trainer.config.specs import spec_of
from tests.student_trainer.runs.api.caller import model_of_no_kind, refused, stub_for, wait_ended
from tests.support.programs import Program

SECRET = b"0123456789abcdefghijklmn"
KEY = "whsec_" + base64.b64encode(SECRET).decode()


class Receiver(ThreadingHTTPServer):
    """Answers with the next of `statuses`, and then 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses: list[int] = []
        self.refused = threading.Event()
        self.accepted = threading.Semaphore(0)
        self.messages: list[dict[str, Any]] = []

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
        digest = base64.b64encode(hmac.new(SECRET, signed, hashlib.sha256).digest()).decode()
        assert self.headers["webhook-signature"] == f"v1,{digest}"
        if status == 200:
            self.server.messages.append({**json.loads(body), "id": self.headers["webhook-id"]})
            self.server.accepted.release()
        else:
            self.server.refused.set()
        self.send_response(status)
        self.send_header("location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def private_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_states_are_posted_until_they_are_accepted(
    trainer_service: Callable[..., Program], receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    entry = f'[hosts."{receiver.place}"]\nsecret = "{KEY}"\nhttp = true\nprivate = true\n'
    options = ("--webhooks", str(private_file(tmp_path / "webhooks.toml", entry)))
    spec = {
        "student": {"model": str(model_of_no_kind(tmp_path))},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
        "labels": {"team": "a"},
        "notify": [{"url": f"http://{receiver.place}/hook?x=1", "states": ["starting", "failed"]}],
    }
    receiver.statuses = [503, 302] + [500] * 1000
    first = trainer_service(*options)
    with stub_for(first.target) as stub:
        other = spec_of({**spec, "notify": [{"url": "https://169.254.169.254/latest"}]})
        with refused(Reason.INVALID_SPEC) as caught:
            stub.CreateRun(CreateRunRequest(spec=other))
        assert [each.field for each in caught[0].violations] == ["notify[0].url"]
        run = wait_ended(stub, stub.CreateRun(CreateRunRequest(spec=spec_of(spec))).name)
    assert receiver.refused.wait(20)
    assert first.stop() == 0
    assert KEY not in first.log(1_000_000)
    receiver.statuses = [503]
    kept = tmp_path / "trainer-data" / "webhooks"
    (kept / "damaged.0.json").write_text("{")
    second = trainer_service(*options)
    for _ in range(2):
        assert receiver.accepted.acquire(timeout=30), second.log()
    states = [(each["state"], each["previous_state"]) for each in receiver.messages]
    assert states == [("STARTING", "PENDING"), ("FAILED", "STARTING")]
    assert [each["id"] for each in receiver.messages] == [
        f"{run.name}/{each['sequence']}" for each in receiver.messages
    ]
    last = receiver.messages[-1]
    assert (last["run"], last["labels"]) == (run.name, {"team": "a"})
    assert last["error"]["message"] == run.error.message
    with stub_for(second.target) as stub:
        stub.DeleteRun(DeleteRunRequest(name=run.name))
    assert list(kept.iterdir()) == []


class Followed:
    """Webhooks of one run that is told of its stops; nobody else uses the store."""

    def __init__(self, store: Store, receiver: Receiver, folder: Path) -> None:
        entry = f'[hosts."{receiver.place}"]\nsecret = "{KEY}"\nhttp = true\nprivate = true\n'
        hosts = WebhookHosts(private_file(folder / "webhooks.toml", entry))
        self.spec = RunSpec(notify=[NotifySpec(url=f"http://{receiver.place}/", states=["stopped"])])
        self.store, self.receiver = store, receiver
        self.db, self.changes = DatabaseThread(), ChangeNotifier()
        self.webhooks = Webhooks(store, self.db, self.changes, hosts, folder / "webhooks")

    async def create(self) -> Run:
        run, _ = await self.db(
            self.store.create, "run-000001", self.spec, self.spec, request_id="", version="1"
        )
        return run

    async def resume(self) -> None:
        self.webhooks.follow(await self.db(self.store.resume, "run-000001"))
        self.changes.notify("run-000001")

    async def stop(self) -> None:
        await self.db(self.store.stop, "run-000001")
        self.changes.notify("run-000001")

    async def told(self) -> None:
        assert await asyncio.to_thread(self.receiver.accepted.acquire, timeout=10)

    async def end(self) -> None:
        """Waits until nothing is followed any more."""
        await asyncio.wait_for(asyncio.gather(*self.webhooks._tasks.values()), 10)


@pytest.fixture
async def followed(receiver: Receiver, tmp_path: Path) -> AsyncIterator[Followed]:
    store = Store.open(tmp_path / "runs.db")
    made = Followed(store, receiver, tmp_path)
    yield made
    await made.webhooks.close()
    made.db.close()
    store.close()


async def test_a_run_that_is_resumed_before_its_stop_was_delivered_is_followed_on(
    followed: Followed, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "RETRIES_S", (0.05,))
    receiver.statuses = [503] * 1000
    await followed.webhooks.start()
    followed.webhooks.follow(await followed.create())
    await followed.stop()
    assert await asyncio.to_thread(receiver.refused.wait, 10)
    await followed.resume()
    receiver.statuses = []
    await followed.told()
    await followed.stop()
    await followed.told()
    await followed.end()
    await followed.resume()
    await followed.stop()
    await followed.told()
    assert [each["sequence"] for each in receiver.messages] == [2, 4, 6]


@pytest.mark.parametrize("writable", [True, False])
async def test_a_run_without_a_file_is_followed_and_a_file_without_a_run_removed(
    followed: Followed, receiver: Receiver, tmp_path: Path, writable: bool
) -> None:
    run = await followed.create()
    kept = tmp_path / "webhooks" / "run-000001.0.json"
    kept.parent.mkdir()
    lost = kept.with_name("run-000000.0.json")
    lost.write_text('{"sequence": 4, "state": 5, "ended": true}')
    if not writable:
        kept.mkdir()
    await followed.webhooks.start()
    followed.webhooks.follow(run)
    await followed.stop()
    await followed.told()
    await followed.end()
    assert [each["sequence"] for each in receiver.messages] == [2]
    assert not lost.exists()
    assert not writable or json.loads(kept.read_text())["ended"]


def test_an_address_is_looked_at_before_it_is_connected(receiver: Receiver) -> None:
    public = WebhookHost(secret=SECRET, http=True)
    inside = ("[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "[::127.0.0.1]", "[fec0::1]", "[2001:0:7f00:1::]")
    private_names = ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254", "[::1]")
    for name in (*private_names, *inside):
        port = receiver.server_address[1]
        with pytest.raises(DeliveryError, match="no public address"):
            post(f"http://{name}:{port}/", public, "id", b"{}", now_s=1)
    private = WebhookHost(secret=SECRET, http=True, private=True)
    receiver.statuses = [307, 410]
    with pytest.raises(DeliveryError, match="answered 307"):  # it is not followed
        post(f"http://{receiver.place}/", private, "id", b"{}", now_s=1)
    with pytest.raises(DeliveryError) as gone:
        post(f"http://{receiver.place}/", private, "id", b"{}", now_s=1)
    assert gone.value.final
    post(f"http://{receiver.place}/", private, "id", b"{}", now_s=1)
    assert receiver.messages == [{"id": "id"}]
    with pytest.raises(DeliveryError, match="label"):
        post(f"http://{'a' * 64}.example/", private, "id", b"{}", now_s=1)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_receiver_that_never_ends_its_answer_is_left(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "TIMEOUT_S", 0.5)
    host = WebhookHost(secret=SECRET, http=True, private=True)
    left = threading.Event()

    def trickle(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            # A status line, or a record of a TLS handshake, that goes on for ever.
            connection.sendall(b"\x16\x03\x03\x40\x00" if scheme == "https" else b"HTTP/1.1 2")
            for _ in range(400):
                connection.sendall(b"0")
                if left.wait(0.02):
                    break

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=trickle, args=(listening,))
        thread.start()
        begin = time.monotonic()
        with pytest.raises(DeliveryError, match="no answer in"):
            post(f"{scheme}://127.0.0.1:{listening.getsockname()[1]}/", host, "id", b"{}", now_s=1)
        assert time.monotonic() - begin < 4
        left.set()
        thread.join()


def test_a_name_that_is_never_looked_up_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(delivery, "_LOOK_UPS", threading.BoundedSemaphore(2))
    host, answered = WebhookHost(secret=SECRET, http=True, private=True), threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        answered.wait(30)
        return []

    with monkeypatch.context() as hanging:
        hanging.setattr(socket, "getaddrinfo", hang)
        begin = time.monotonic()
        for _ in range(3):  # the last one while two threads hang
            with pytest.raises(DeliveryError, match=r"a\.example gives no answer in 0\.2 s"):
                post("http://a.example/", host, "id", b"{}", now_s=1)
        assert time.monotonic() - begin < 10
        answered.set()
    with pytest.raises(DeliveryError, match=r"no answer|cannot be reached"):
        post("http://127.0.0.1:9/", host, "id", b"{}", now_s=1)


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example/",  # not by plain HTTP
        "https://b.example/",
        "https://a.example:444/",
        "https://a.example@b.example/",
        "https://a.example.b.example/",
        "https://a.example/#x",
        "https://a.example/ x",
        "https://a.example:x/",
        "file:///etc/passwd",
        "",
    ],
)
def test_only_hosts_of_the_file_are_allowed(tmp_path: Path, url: str) -> None:
    path = private_file(tmp_path / "hosts.toml", f'[hosts."a.example"]\nsecret = "{KEY}"\n')
    hosts = WebhookHosts(path)
    assert hosts.find("https://A.example/hook?a=b").secret == SECRET
    assert hosts.find("https://a.example:443").secret == SECRET
    with pytest.raises(StillhouseError):
        hosts.find(url)
    with pytest.raises(StillhouseError, match="--webhooks"):
        WebhookHosts(None).find("https://a.example/")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[hosts", "Expected"),
        ('[hosts."a"]\nsecret = "abc"\n', "whsec_"),
        (f'[hosts."a"]\nsecret = "{KEY}"\nhtpp = true\n', "htpp"),
        (f'[hosts."a"]\nsecret = "{KEY}"\nhttp = "yes"\n', "true or false"),
        ("[host]\n", "tables"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = private_file(tmp_path / "hosts.toml", text)
    with pytest.raises(StillhouseError, match=why):
        WebhookHosts(path)
    path.chmod(0o644)
    with pytest.raises(StillhouseError, match="chmod 600"):
        WebhookHosts(path)
