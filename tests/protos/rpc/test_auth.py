"""Authentication: every rpc against every kind of caller; error messages and audit lines of refusals."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc import tokens as auth_tokens
from stillhouse.protos.rpc.audit import READS, AuditLog
from stillhouse.protos.rpc.auth import SCOPES, TokenFile, current_caller
from stillhouse.protos.rpc.channel import ChannelOptions
from stillhouse.protos.rpc.server import Server
from stillhouse.protos.rpc.tls import ServerTls
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2
from stillhouse.protos.telemetry.call_record import Caller, CallRecord
from tests.support.networks.async_channel import connect_async
from tests.support.networks.certificates import Certificates, make_certificates

SERVICES = [
    service
    for file in (teacher_pb2.DESCRIPTOR, run_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
]
RPCS = {f"/{service.full_name}/{rpc.name}": rpc for service in SERVICES for rpc in service.methods}
CALLERS = ("none", "wrong", "revoked", "garbled", "twice", "expired", "infer", "submit", "admin")


def test_every_rpc_of_the_contract_has_a_scope_and_nothing_else_has() -> None:
    assert set(SCOPES) == set(RPCS)
    assert set(RPCS) > READS


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarded:
    """A server that replies to every rpc with an empty message, and its tokens."""

    address: str
    path: Path
    tokens: dict[str, str]
    reached: list[tuple[str, Caller]]
    records: list[CallRecord]
    go: asyncio.Event
    """Set to let streams respond."""


def handlers(
    reached: list[tuple[str, Caller]], rpcs: dict[str, MethodDescriptor], go: asyncio.Event | None = None
) -> list[Any]:
    def answering(method: str, rpc: MethodDescriptor) -> Any:
        answer = GetMessageClass(rpc.output_type)()

        async def unary(_request: Any, _context: Any) -> Any:
            reached.append((method, current_caller()))
            return answer

        async def stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
            reached.append((method, current_caller()))
            if go is not None:
                await go.wait()
            yield answer

        sends = "stream" if rpc.client_streaming else "unary"
        kind = f"{sends}_{'stream' if rpc.server_streaming else 'unary'}_rpc_method_handler"
        return getattr(grpc, kind)(
            stream if rpc.server_streaming else unary,
            request_deserializer=GetMessageClass(rpc.input_type).FromString,
            response_serializer=GetMessageClass(rpc.output_type).SerializeToString,
        )

    return [
        grpc.method_handlers_generic_handler(
            service, {method.rpartition("/")[2]: answering(method, rpc) for method, rpc in group}
        )
        for service, group in itertools.groupby(rpcs.items(), key=lambda item: item[0].split("/")[1])
    ]


@asynccontextmanager
async def guarded(
    directory: Path,
    *,
    tls: ServerTls | None = None,
    rpcs: dict[str, MethodDescriptor] = RPCS,
    max_calls: int = 256,
) -> AsyncIterator[Guarded]:
    path = directory / "tokens.json"
    tokens = {"wrong": "sth_aaaaaaaa_" + "x" * 43, "garbled": "\u00e4", "none": ""}
    for name in ("infer", "submit", "admin", "expired", "revoked"):
        scope = Scope(name) if name in ("infer", "submit") else Scope.ADMIN
        tokens[name], _ = auth_tokens.create(path, name=name, scopes=[scope], lifetime_s=3600)
    auth_tokens.revoke(path, "revoked")
    document = json.loads(path.read_text())
    next(each for each in document["tokens"] if each["name"] == "expired")["expire_time"] = (
        "2020-01-01T00:00:00Z"
    )
    path.write_text(json.dumps(document))
    reached: list[tuple[str, Caller]] = []
    records: list[CallRecord] = []
    go = asyncio.Event()
    go.set()
    server = Server(
        listen="127.0.0.1:0",
        tls=tls,
        insecure=False,
        reflection=None,
        services=[service.full_name for service in SERVICES],
        max_calls=max_calls,
        tokens=TokenFile(path),
        observers=[records.append, AuditLog(directory / "audit.jsonl")],
    )
    server.aio.add_generic_rpc_handlers(handlers(reached, rpcs, go))
    address = await server.start()
    try:
        yield Guarded(address=address, path=path, tokens=tokens, reached=reached, records=records, go=go)
    finally:
        await server.stop(0)


async def call(
    channel: grpc.aio.Channel, method: str, *authorization: str, rpc: MethodDescriptor | None = None
) -> None:
    """Calls the rpc with an empty request; raises its error."""
    rpc = rpc or RPCS[method]
    sends = "stream" if rpc.client_streaming else "unary"
    answers = "stream" if rpc.server_streaming else "unary"
    request = GetMessageClass(rpc.input_type)()
    multicallable = getattr(channel, f"{sends}_{answers}")(
        method,
        request_serializer=GetMessageClass(rpc.input_type).SerializeToString,
        response_deserializer=GetMessageClass(rpc.output_type).FromString,
    )

    async def requests() -> AsyncIterator[Any]:
        yield request

    metadata = tuple(("authorization", each) for each in authorization)
    made = multicallable(requests() if sends == "stream" else request, metadata=metadata, timeout=20)
    if answers == "stream":
        async for _ in made:
            pass
    else:
        await made


async def refusal(
    channel: grpc.aio.Channel, method: str, *authorization: str, **options: Any
) -> StillhouseError:
    with pytest.raises(grpc.RpcError) as caught:
        await call(channel, method, *authorization, **options)
    return from_rpc_error(caught.value, target="here", service="trainer")


def expected(caller: str, method: str) -> Reason | None:
    if caller in ("none", "wrong", "revoked", "garbled", "twice", "expired"):
        return Reason.UNAUTHENTICATED
    return None if caller in ("admin", SCOPES[method].value) else Reason.PERMISSION_DENIED


@pytest.mark.faults(row=15)
async def test_the_matrix_of_rpcs_and_tokens(tmp_path: Path) -> None:
    outcomes: dict[tuple[str, str], Reason | None] = {}
    async with guarded(tmp_path) as server, connect_async(server.address) as channel:
        headers: dict[str, tuple[str, ...]] = {
            name: (f"Bearer {token}",) for name, token in server.tokens.items()
        }
        headers |= {
            "none": (),
            "garbled": ("Basic YWRtaW46YWRtaW4=",),
            "twice": (*headers["admin"], *headers["admin"]),
        }
        for method, caller in itertools.product(RPCS, CALLERS):
            before = len(server.reached)
            if expected(caller, method) is None:
                await call(channel, method, *headers[caller])
                outcomes[method, caller] = None
                reached, who = server.reached[-1]
                assert (reached, who) == (method, Caller(name=caller, is_admin=caller == "admin"))
            else:
                error = await refusal(channel, method, *headers[caller])
                outcomes[method, caller] = error.reason
                assert len(server.reached) == before, "a refused call must not reach its servicer"
                assert "stillhouse token create" in error.message
                assert not any(secret and secret in error.message for secret in server.tokens.values())
        assert outcomes == {pair: expected(pair[1], pair[0]) for pair in itertools.product(RPCS, CALLERS)}

        audit = (tmp_path / "audit.jsonl").read_text()
        assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600
        assert not any(secret and secret in audit for secret in server.tokens.values())
        lines = [json.loads(line) for line in audit.splitlines()]
        refused = {(line["rpc"], line["who"]) for line in lines if not line["allowed"]}
        assert ("RunService/CreateRun", "infer") in refused
        assert ("RunService/GetRun", "anybody") in refused, "refused reads are written down too"
        done = {(line["rpc"], line["who"]) for line in lines if line["outcome"] == "OK"}
        assert done == {
            (method.rpartition(".")[2], caller)
            for (method, caller), reason in outcomes.items()
            if reason is None and method not in READS
        }


async def test_an_unlisted_rpc_is_refused_to_every_caller(tmp_path: Path) -> None:
    method = "/stillhouse.v1.RunService/Later"
    rpc = RPCS["/stillhouse.v1.RunService/GetRun"]
    async with guarded(tmp_path, rpcs={method: rpc}) as server, connect_async(server.address) as channel:
        error = await refusal(channel, method, f"Bearer {server.tokens['admin']}", rpc=rpc)
        assert (error.reason, server.reached) == (Reason.PERMISSION_DENIED, [])


@pytest.mark.faults(row=15)
async def test_wrong_authorities_and_plaintext_reach_no_rpc_whatever_the_token(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    tls = ServerTls(
        cert=certificates.server.cert, key=certificates.server.key, client_ca=certificates.authority.cert
    )
    async with guarded(tmp_path, tls=tls) as server:
        good = channel_options(server.address, certificates)
        stranger = certificates.foreign_client
        bad = {
            "plaintext": ChannelOptions(target=server.address),
            "the service's authority is unknown": replace(good, ca=certificates.stranger.cert),
            "the caller's authority is unknown": replace(good, cert=stranger.cert, key=stranger.key),
            "no certificate": replace(good, cert=None, key=None),
        }
        admin = f"Bearer {server.tokens['admin']}"
        for options in bad.values():
            async with connect_async(options) as channel:
                errors = await asyncio.gather(*(refusal(channel, method, admin) for method in RPCS))
                assert {error.code for error in errors} == {grpc.StatusCode.UNAVAILABLE}
        assert server.reached == []
        async with connect_async(good) as channel:
            # A certificate authenticates the connection; a token grants the scopes.
            assert (await refusal(channel, next(iter(RPCS)))).reason == Reason.UNAUTHENTICATED
            for method in RPCS:
                await call(channel, method, admin)
        assert [method for method, _ in server.reached] == list(RPCS)


def channel_options(address: str, certificates: Certificates) -> ChannelOptions:
    client = certificates.client
    return ChannelOptions(target=address, ca=certificates.authority.cert, cert=client.cert, key=client.key)


async def test_the_body_of_a_refused_call_is_not_read(tmp_path: Path) -> None:
    # 33 MiB exceed the receive limit: reading them would give another error.
    async with guarded(tmp_path) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            send: Any = channel.unary_unary("/stillhouse.v1.RunService/CreateRun")
            with pytest.raises(grpc.RpcError) as caught:
                await send(b"x" * (33 * 2**20), timeout=20)
        error = from_rpc_error(caught.value, target="here", service="trainer")
        assert error.reason == Reason.UNAUTHENTICATED


async def test_a_changed_file_applies_at_once_and_a_broken_one_admits_no_caller(tmp_path: Path) -> None:
    method = "/stillhouse.v1.RunService/ListRuns"
    async with guarded(tmp_path) as server, connect_async(server.address) as channel:
        later, _ = auth_tokens.create(server.path, name="later", scopes=[Scope.SUBMIT], lifetime_s=None)
        await call(channel, method, f"Bearer {later}")
        auth_tokens.revoke(server.path, "later")
        assert (await refusal(channel, method, f"Bearer {later}")).reason == Reason.UNAUTHENTICATED
        admin = f"Bearer {server.tokens['admin']}"
        await call(channel, method, admin)
        server.path.chmod(0o644)
        assert (await refusal(channel, method, admin)).reason == Reason.UNAUTHENTICATED
        server.path.chmod(0o600)
        await call(channel, method, admin)
        server.path.unlink()
        assert (await refusal(channel, method, admin)).reason == Reason.UNAUTHENTICATED


async def test_one_client_leaves_room_for_others(tmp_path: Path) -> None:
    method = "/stillhouse.v1.RunService/WatchRun"
    async with guarded(tmp_path, max_calls=4) as server, connect_async(server.address) as channel:
        ada, admin = f"Bearer {server.tokens['submit']}", f"Bearer {server.tokens['admin']}"
        server.go.clear()
        async with asyncio.TaskGroup() as running:
            for _ in range(3):
                running.create_task(call(channel, method, ada))
            while len(server.reached) < 3:  # noqa: ASYNC110 - the server is asked, and has no event
                await asyncio.sleep(0.01)
            assert (await refusal(channel, method, ada)).reason == Reason.TOO_MANY_CALLS
            assert len(server.reached) == 3
            running.create_task(call(channel, method, admin))
            while len(server.reached) < 4:  # noqa: ASYNC110 - the server is asked, and has no event
                await asyncio.sleep(0.01)
            server.go.set()
        await call(channel, method, ada)


async def test_without_tokens_a_certificate_names_the_caller(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    tls = ServerTls(
        cert=certificates.server.cert, key=certificates.server.key, client_ca=certificates.authority.cert
    )
    reached: list[tuple[str, Caller]] = []
    server = Server(listen="127.0.0.1:0", tls=tls, insecure=False, reflection=None, services=[], max_calls=9)
    server.aio.add_generic_rpc_handlers(handlers(reached, RPCS))
    address = await server.start()
    async with connect_async(channel_options(address, certificates)) as channel:
        await call(channel, "/stillhouse.v1.RunService/ListRuns")
    assert reached[0][1] == Caller(name="certificate:client", is_admin=True)
    await server.stop(0)


def test_a_full_audit_log_is_set_aside_once(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, max_bytes=1000)
    for number in range(20):
        audit(
            CallRecord(
                method="/stillhouse.v1.RunService/StopRun",
                caller=Caller(name="ci", is_admin=False),
                peer="ipv4:127.0.0.1:5",
                what=f"runs/{number}",
                outcome="OK",
                seconds=0.1,
            )
        )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["audit.jsonl", "audit.jsonl.1"]
    assert path.stat().st_size <= 1000
    assert json.loads(path.read_text().splitlines()[-1])["what"] == "runs/19"
