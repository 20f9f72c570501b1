"""Errors over the wire: callers catch the error that a servicer raised, for all kinds of rpc and channel."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import RECEIVE_LIMIT_BYTES, ChannelOptions, connect
from stillhouse.protos.stillhouse.v1 import run_pb2, run_pb2_grpc, teacher_pb2
from tests.protos.rpc.serving import SERVICE, Step, Told, Written, serving, stub_of
from tests.support.networks.async_channel import connect_async

INFO = teacher_pb2.GetTeacherInfoRequest()
FILES = teacher_pb2.GetTokenizerRequest()
PIECE = teacher_pb2.UploadAdapterRequest(data=b"x")
SEQUENCE = teacher_pb2.ScoreRequest(sequence=teacher_pb2.ScoreSequence(sequence_id=1))
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


async def call_async(stub: Any, kind: str, **options: Any) -> Any:
    options.setdefault("timeout", 20)
    match kind:
        case "unary_unary":
            return await stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(), **options)
        case "unary_stream":
            return [each async for each in stub.GetTokenizer(FILES, **options)]
        case "stream_unary":
            return await stub.UploadAdapter(iter([PIECE]), **options)
        case _:
            return [each async for each in stub.Score(iter([SEQUENCE]), **options)]


def call_blocking(target: str, kind: str, options: ChannelOptions) -> Any:
    with connect(options) as channel:
        stub = stub_of(channel)
        match kind:
            case "unary_unary":
                return stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(), timeout=20)
            case "unary_stream":
                return list(stub.GetTokenizer(FILES, timeout=20))
            case "stream_unary":
                return stub.UploadAdapter(iter([PIECE]), timeout=20)
            case _:
                return list(stub.Score(iter([SEQUENCE]), timeout=20))


def raising(error: BaseException) -> Step:
    async def step() -> None:
        raise error

    return step


async def caught(
    call: Callable[[], Awaitable[Any]], address: str, service: str = "teacher"
) -> StillhouseError:
    with pytest.raises(grpc.RpcError) as failure:
        await call()
    return from_rpc_error(failure.value, target=address, service=service)


FULL = StillhouseError(
    Reason.TOP_K_TOO_LARGE,
    "top_k is 512 (é): this teacher gives at most 64.",
    metadata={"limit": "64"},
    violations=[FieldViolation(field="config.top_k", description="is 512")],
    retry_after_s=2,
    resource="teacher",
)


def assert_is_full(error: StillhouseError) -> None:
    assert (error.reason, error.message, error.metadata) == (FULL.reason, FULL.message, FULL.metadata)
    assert (error.violations, error.retry_after_s, error.resource) == (FULL.violations, 2, "teacher")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_async_caller_gets_the_complete_error(kind: str) -> None:
    async with serving(Told(raising(FULL))) as address, connect_async(address) as channel:
        assert_is_full(await caught(lambda: call_async(stub_of(channel), kind), address))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_blocking_caller_gets_the_complete_error(kind: str) -> None:
    async with serving(Told(raising(FULL))) as address:
        call = asyncio.to_thread(call_blocking, address, kind, ChannelOptions(target=address))
        assert_is_full(await caught(lambda: call, address))


async def test_a_stream_that_writes_its_answers_is_guarded_as_well() -> None:
    async with serving(Written(raising(FULL))) as address, connect_async(address) as channel:
        call = stub_of(channel).GetTokenizer(FILES)
        assert (await call.read()).file_name == "a"
        assert_is_full(await caught(call.read, address))


async def test_every_reason_survives_the_wire() -> None:
    servicer = Told()
    async with serving(servicer) as address, connect_async(address) as channel:
        for reason in Reason:
            servicer.step = raising(StillhouseError(reason, f"{reason}."))
            error = await caught(lambda: call_async(stub_of(channel), "unary_unary"), address)
            assert (error.reason, error.message) == (reason, f"{reason}.")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bug_crosses_the_wire_as_a_log_id(kind: str) -> None:
    async with (
        serving(Told(raising(RuntimeError("the secret")))) as address,
        connect_async(address) as channel,
    ):
        with capture_logs() as logs:
            error = await caught(lambda: call_async(stub_of(channel), kind), address)
    assert error.reason == Reason.INTERNAL
    assert "secret" not in str(error)
    assert [entry["log_id"] for entry in logs] == [error.metadata["log_id"]]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancellation_inside_the_service_ends_the_call_as_cancelled(kind: str) -> None:
    async with serving(Told(raising(asyncio.CancelledError()))) as address, connect_async(address) as channel:
        error = await asyncio.wait_for(caught(lambda: call_async(stub_of(channel), kind), address), 10)
    assert error.reason == Reason.CANCELLED


async def test_the_catalogs_error_stands_for_a_task_group() -> None:
    group = ExceptionGroup("", [ValueError(), FULL])
    async with serving(Told(raising(group))) as address, connect_async(address) as channel:
        assert_is_full(await caught(lambda: call_async(stub_of(channel), "stream_stream"), address))


async def test_a_caller_who_hangs_up_closes_the_stream_at_once_and_logs_no_error() -> None:
    servicer = Told(asyncio.Event().wait)  # type: ignore[arg-type]
    async with serving(servicer) as address, connect_async(address) as channel:
        with capture_logs() as logs:
            call = stub_of(channel).GetTokenizer(FILES)
            assert (await call.read()).file_name == "a"
            call.cancel()
            await asyncio.wait_for(servicer.closed.wait(), 60)
    assert logs == []


async def test_a_deadline_is_a_timeout_not_a_bug() -> None:
    async with serving(Told(asyncio.Event().wait)) as address, connect_async(address) as channel:  # type: ignore[arg-type]
        with capture_logs() as logs:
            error = await caught(lambda: call_async(stub_of(channel), "unary_unary", timeout=0.2), address)
    assert error.reason == Reason.CALL_TIMEOUT
    assert address in error.message
    assert logs == []


async def test_an_idempotent_call_is_repeated_while_the_service_loads() -> None:
    servicer = Told()

    async def loading() -> None:
        if servicer.num_calls < 3:
            raise StillhouseError(Reason.TEACHER_LOADING, "Loading.", retry_after_s=0.05)

    servicer.step = loading
    async with serving(servicer) as address, connect_async(address) as channel:
        assert (await stub_of(channel).GetTeacherInfo(INFO, timeout=60)).model == "m"
    assert servicer.num_calls == 3


@pytest.mark.parametrize(
    ("reason", "retry_after_s"), [(Reason.DISK_FULL, None), (Reason.QUOTA, None), (Reason.TEACHER_LOADING, 5)]
)
async def test_lasting_errors_are_not_retried(reason: Reason, retry_after_s: float | None) -> None:
    servicer = Told(raising(StillhouseError(reason, "Full.", retry_after_s=retry_after_s)))
    async with serving(servicer) as address, connect_async(address) as channel:
        error = await caught(lambda: stub_of(channel).GetTeacherInfo(INFO, timeout=60), address)
    assert error.reason == reason
    assert servicer.num_calls == 1


async def test_many_violations_fit_through_the_headers() -> None:
    violations = [FieldViolation(field=f"loss.terms[{i}].weight", description="é" * 200) for i in range(500)]
    error = StillhouseError(Reason.INVALID_SPEC, "é" * 3000, violations=violations)
    async with serving(Told(raising(error))) as address, connect_async(address) as channel:
        got = await caught(lambda: call_async(stub_of(channel), "unary_unary"), address)
    assert got.reason == Reason.INVALID_SPEC
    assert len(got.violations) > 40


@pytest.mark.parametrize(
    ("service", "reason"), [("teacher", "TEACHER_UNREACHABLE"), ("trainer", "SERVICE_UNREACHABLE")]
)
async def test_an_unreachable_service_is_one_sentence_with_a_remedy(service: str, reason: str) -> None:
    async with serving(Told()) as address:
        pass
    async with connect_async(address) as channel:
        error = await caught(lambda: call_async(stub_of(channel), "unary_unary"), address, service)
    assert error.reason == reason
    assert error.message.startswith(f"No {service} answers at {address}")
    assert f"stillhouse-{service}" in error.message


async def test_the_wrong_service_at_an_address_is_reported() -> None:
    async with serving(Told()) as address, connect_async(address) as channel:
        call = run_pb2_grpc.RunServiceStub(channel).GetRun
        error = await caught(lambda: call(run_pb2.GetRunRequest(), timeout=60), address, "trainer")
    assert error.code == grpc.StatusCode.UNIMPLEMENTED
    assert f"The service at {address} is not a trainer" in error.message


async def test_a_message_beyond_the_limit_is_refused_and_the_server_lives() -> None:
    async with serving(Told()) as address, grpc.aio.insecure_channel(address) as channel:
        huge = teacher_pb2.UploadAdapterRequest(data=bytes(RECEIVE_LIMIT_BYTES + 1))
        error = await caught(lambda: stub_of(channel).UploadAdapter(iter([huge])), address)
        assert error.reason == Reason.MESSAGE_TOO_LARGE
        await call_async(stub_of(channel), "stream_unary")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("unary_unary", "GetTeacherInfo"),
        ("unary_stream", "GetTokenizer"),
        ("stream_unary", "UploadAdapter"),
        ("stream_stream", "Score"),
    ],
)
async def test_undecodable_bytes_are_an_invalid_request(kind: str, name: str) -> None:
    garbage = b"\x0a\xff\xff\xff\xff\x07"

    def call(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            method = getattr(channel, kind)(f"/{SERVICE}/{name}", request_serializer=bytes)
            answer = method(iter([b"", garbage]) if kind.startswith("stream") else garbage, timeout=60)
            list(answer) if kind.endswith("stream") else None

    async with serving(Told()) as address:
        with capture_logs() as logs:
            error = await caught(lambda: asyncio.to_thread(call, address), address)
    assert error.reason == Reason.INVALID_REQUEST
    assert "cannot be decoded" in error.message
    assert [entry["event"] for entry in logs] == ["call refused"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocking", [False, True])
async def test_name_and_token_travel_with_every_call(kind: str, blocking: bool) -> None:
    servicer = Told()
    async with serving(servicer) as address:
        options = ChannelOptions(target=address, token="t0", client_name="lab")
        if blocking:
            await asyncio.to_thread(call_blocking, address, kind, options)
        else:
            async with connect_async(options) as channel:
                await call_async(stub_of(channel), kind, metadata=(("own", "1"),))
    assert servicer.metadata["authorization"] == "Bearer t0"
    assert servicer.metadata["stillhouse-client"] == "lab"
    assert blocking or servicer.metadata["own"] == "1"


async def test_a_stream_may_be_written_to_piece_by_piece() -> None:
    async with (
        serving(Told()) as address,
        connect_async(ChannelOptions(target=address, client_name="a")) as channel,
    ):
        call = stub_of(channel).Score()
        for number in range(3):
            request = teacher_pb2.ScoreRequest(sequence=teacher_pb2.ScoreSequence(sequence_id=number))
            await call.write(request)
            assert (await call.read()).results[0].sequence_id == number
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF
        with contextlib.suppress(asyncio.CancelledError):
            call.cancel()
