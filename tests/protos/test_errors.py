"""Error catalog: both directions, bounded, without internal text."""

import asyncio
import pickle

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from structlog.testing import capture_logs

from stillhouse.protos.errors import (
    MAX_STATUS_BYTES,
    FieldViolation,
    Reason,
    StillhouseError,
    first_line,
    from_json,
    from_status,
    to_json,
    to_status,
)


def full(reason: Reason) -> StillhouseError:
    return StillhouseError(
        reason,
        "loss.top_k is 512; this teacher gives at most 64. Lower it.",
        metadata={"value": "512", "limit": "64"},
        violations=[FieldViolation(field="loss.top_k", description="is 512")],
        retry_after_s=1.25,
        resource="runs/abc",
    )


def parts(error: StillhouseError) -> tuple[object, ...]:
    return (
        error.reason,
        str(error),
        error.metadata,
        error.violations,
        error.retry_after_s,
        error.resource,
        error.code,
    )


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_round_trips(reason: Reason) -> None:
    error = full(reason)
    assert parts(from_status(to_status(error))) == parts(error)
    assert parts(from_status(from_json(to_json(to_status(error))))) == parts(error)
    assert parts(pickle.loads(pickle.dumps(error))) == parts(error)
    number: int = error.code.value[0]
    assert to_status(error).code == number != 0


def test_the_table_of_codes_is_the_one_that_was_agreed() -> None:
    code = {reason: StillhouseError(reason, "").code for reason in Reason}
    assert code[Reason.INVALID_SPEC] == grpc.StatusCode.INVALID_ARGUMENT
    assert code[Reason.RUN_NOT_FOUND] == grpc.StatusCode.NOT_FOUND
    assert code[Reason.RUN_STATE] == grpc.StatusCode.FAILED_PRECONDITION
    assert code[Reason.TOKENIZER_MISMATCH] == grpc.StatusCode.FAILED_PRECONDITION
    assert code[Reason.REQUEST_CONFLICT] == grpc.StatusCode.ALREADY_EXISTS
    assert code[Reason.DRAINING] == grpc.StatusCode.UNAVAILABLE
    assert code[Reason.DISK_FULL] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert code[Reason.CAPABILITY] == grpc.StatusCode.UNIMPLEMENTED
    assert code[Reason.ITEM_TIMEOUT] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert code[Reason.CURSOR_EXPIRED] == grpc.StatusCode.OUT_OF_RANGE
    assert code[Reason.NON_FINITE] == grpc.StatusCode.DATA_LOSS
    assert [reason for reason in Reason if reason.value != reason.name] == []


def test_only_transient_errors_are_retryable() -> None:
    assert StillhouseError(Reason.TEACHER_LOADING, "").retryable
    assert StillhouseError(Reason.TOO_MANY_CALLS, "").retryable
    assert not StillhouseError(Reason.DISK_FULL, "").retryable
    assert not StillhouseError(Reason.INTERNAL, "").retryable


def test_a_bug_leaves_a_log_id_and_nothing_else() -> None:
    with capture_logs() as logs:
        error = from_status(to_status(KeyError("the secret")))
    assert error.reason == Reason.INTERNAL
    assert "secret" not in str(to_status(error))
    assert "KeyError" not in str(error)
    assert [entry["log_id"] for entry in logs] == [error.metadata["log_id"]]
    assert error.metadata["log_id"] in error.message


def test_a_cancellation_is_not_a_bug() -> None:
    with capture_logs() as logs:
        assert to_status(asyncio.CancelledError()).code == grpc.StatusCode.CANCELLED.value[0]
    assert logs == []


def test_the_catalogs_error_stands_for_a_group() -> None:
    known = StillhouseError(Reason.QUOTA, "too much")
    group = BaseExceptionGroup("", [asyncio.CancelledError(), ExceptionGroup("", [ValueError(), known])])
    assert from_status(to_status(group)).reason == Reason.QUOTA
    with capture_logs() as logs:
        bug = BaseExceptionGroup("", [asyncio.CancelledError(), ValueError()])
        assert from_status(to_status(bug)).reason == Reason.INTERNAL
    assert len(logs) == 1


def test_a_thousand_violations_are_cut_and_counted() -> None:
    violations = [FieldViolation(field=f"f[{i}]", description="x" * 100) for i in range(1000)]
    status = to_status(StillhouseError(Reason.INVALID_SPEC, "wrong", violations=violations))
    assert status.ByteSize() <= MAX_STATUS_BYTES + 1000
    back = from_status(status).violations
    assert back[:-1] == tuple(violations[: len(back) - 1])
    assert back[-1].description.startswith(f"{1001 - len(back)} further fields")


def test_text_that_headers_cannot_hold_is_cleaned() -> None:
    back = from_status(
        to_status(StillhouseError(Reason.MODEL_NOT_FOUND, "no /a\udcff", metadata={"p": "\udcff"}))
    )
    assert back.message == "no /a?"
    assert len(from_status(to_status(StillhouseError(Reason.QUOTA, "x" * 10**6))).message) == 2000


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_a_status_without_our_details_keeps_its_code(code: grpc.StatusCode) -> None:
    error = from_status(status_pb2.Status(code=code.value[0]))
    assert error.code == code or error.reason == Reason.INTERNAL
    assert code.name in error.message


def test_unreadable_details_are_skipped() -> None:
    torn = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    foreign = any_pb2.Any(type_url="type.googleapis.com/acme.Unknown", value=b"x")
    later = any_pb2.Any()
    later.Pack(
        error_details_pb2.ErrorInfo(reason="OF_A_LATER_VERSION", domain="stillhouse", metadata={"a": "b"})
    )
    status = status_pb2.Status(code=5, message="gone", details=[torn, foreign, later])
    error = from_status(status)
    assert (error.reason, error.metadata) == (Reason.NOT_FOUND, {"a": "b", "reason": "OF_A_LATER_VERSION"})
    assert [each["@type"] for each in to_json(status)["details"]] == [later.type_url]


@pytest.mark.parametrize(
    "plain", [{"code": "x"}, {"details": [1]}, {"details": [{"@type": "nonsense"}]}, {"message": 5}]
)
def test_json_that_is_no_status_is_a_value_error(plain: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not an error record"):
        from_json(plain)


def test_a_foreign_headline_is_told_with_the_line_that_says_what_is_wrong() -> None:
    assert first_line(ValueError("\nValidation error for field 'x':\n    expected bool\nmore")) == (
        "Validation error for field 'x': expected bool"
    )
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(AssertionError()) == "AssertionError"
