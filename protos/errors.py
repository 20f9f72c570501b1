"""One catalog of errors: exception <-> google.rpc.Status, both directions; no internal text crosses the wire."""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
import structlog
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

Code = grpc.StatusCode
DOMAIN = "stillhouse"
MAX_SENTENCE_CHARS = 2000
"""Longer messages are cut: they travel in HTTP/2 headers."""
MAX_STATUS_BYTES = 24 * 1024
"""Field violations beyond this are counted instead of sent, for the same reason."""

log = structlog.get_logger(__name__)


class Reason(StrEnum):
    """Cause of an error, for programs. A new one needs a line here and one in CATALOG."""

    INVALID_SPEC = "INVALID_SPEC"
    INVALID_CONFIG = "INVALID_CONFIG"
    INVALID_REQUEST = "INVALID_REQUEST"
    SEQUENCE_TOO_LONG = "SEQUENCE_TOO_LONG"
    TOKEN_OUT_OF_RANGE = "TOKEN_OUT_OF_RANGE"  # noqa: S105 - the name of an error
    EMPTY_SEQUENCE = "EMPTY_SEQUENCE"
    TOP_K_TOO_LARGE = "TOP_K_TOO_LARGE"
    TENSOR_INVALID = "TENSOR_INVALID"
    DATASET_INVALID = "DATASET_INVALID"
    ADAPTER_INVALID = "ADAPTER_INVALID"
    TOKENIZER_INVALID = "TOKENIZER_INVALID"
    NOT_FOUND = "NOT_FOUND"
    RUN_NOT_FOUND = "RUN_NOT_FOUND"
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    DATASET_NOT_FOUND = "DATASET_NOT_FOUND"
    ARTIFACT_NOT_FOUND = "ARTIFACT_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    RUN_STATE = "RUN_STATE"
    DATASET_IN_USE = "DATASET_IN_USE"
    TOKENIZER_MISMATCH = "TOKENIZER_MISMATCH"
    TEACHER_CHANGED = "TEACHER_CHANGED"
    REQUEST_CONFLICT = "REQUEST_CONFLICT"
    ADAPTER_CONFLICT = "ADAPTER_CONFLICT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    PATH_NOT_ALLOWED = "PATH_NOT_ALLOWED"
    TEACHER_LOADING = "TEACHER_LOADING"
    DRAINING = "DRAINING"
    TEACHER_UNREACHABLE = "TEACHER_UNREACHABLE"
    SERVICE_UNREACHABLE = "SERVICE_UNREACHABLE"
    DATABASE_UNREACHABLE = "DATABASE_UNREACHABLE"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    QUOTA = "QUOTA"
    ADAPTER_SLOTS = "ADAPTER_SLOTS"
    DISK_FULL = "DISK_FULL"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    CAPABILITY = "CAPABILITY"
    ITEM_TIMEOUT = "ITEM_TIMEOUT"
    CALL_TIMEOUT = "CALL_TIMEOUT"
    CURSOR_EXPIRED = "CURSOR_EXPIRED"
    NON_FINITE = "NON_FINITE"
    CHECKPOINT_CORRUPT = "CHECKPOINT_CORRUPT"
    EXPORT_FAILED = "EXPORT_FAILED"
    CACHE_INVALID = "CACHE_INVALID"
    CACHE_NOT_FOUND = "CACHE_NOT_FOUND"
    CACHE_LOCKED = "CACHE_LOCKED"
    CACHE_MISS = "CACHE_MISS"
    PROCESS_DIED = "PROCESS_DIED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


# A code's first reason also stands for a status without one of ours. Meaning and remedy are for docs/reference/errors.md.
CATALOG: Mapping[Code, Mapping[Reason, str]] = {
    Code.INVALID_ARGUMENT: {
        Reason.INVALID_REQUEST: "A request has a value that the service cannot take. Correct the value that the message names.",
        Reason.INVALID_SPEC: "A run's configuration is wrong. Correct the fields that the violations name.",
        Reason.INVALID_CONFIG: "A program cannot work with its settings. Correct the flag or the file that the message names.",
        Reason.SEQUENCE_TOO_LONG: "A sequence is longer than the teacher takes. Shorten it, or raise --max-sequence-tokens.",
        Reason.TOKEN_OUT_OF_RANGE: "A token id is not in the teacher's vocabulary. Tokenize with the teacher's own tokenizer.",
        Reason.EMPTY_SEQUENCE: "A sequence or conversation has too few tokens. Send more.",
        Reason.TOP_K_TOO_LARGE: "The top_k is above the teacher's. Lower it, or raise --max-top-k.",
        Reason.TENSOR_INVALID: "A tensor's bytes, shape or values are wrong. Correct the program that sent it.",
        Reason.DATASET_INVALID: "A dataset, or a row of it, cannot be read. Correct the row that the message names.",
        Reason.ADAPTER_INVALID: "An adapter's files are wrong or do not fit the model. Save it in PEFT's layout for this base.",
        Reason.TOKENIZER_INVALID: "A tokenizer's files cannot be read. Check the model's directory on the teacher's host.",
    },
    Code.NOT_FOUND: {
        Reason.NOT_FOUND: "A named thing does not exist. Correct the name.",
        Reason.RUN_NOT_FOUND: "There is no such run. See `stillhouse run list`.",
        Reason.ADAPTER_NOT_FOUND: "No such adapter is loaded. Load it with `stillhouse teacher load-adapter`.",
        Reason.DATASET_NOT_FOUND: "A dataset is not on the trainer's host. Upload it with `stillhouse data push`.",
        Reason.ARTIFACT_NOT_FOUND: "The run has no such file. See `stillhouse run artifacts`.",
        Reason.MODEL_NOT_FOUND: "A model's directory or hub id does not exist. Correct it, or download the model.",
        Reason.CACHE_NOT_FOUND: "There is no such cache. Build it with `stillhouse cache build`.",
    },
    Code.FAILED_PRECONDITION: {
        Reason.RUN_STATE: "The run's state forbids it. See `stillhouse run show`.",
        Reason.DATASET_IN_USE: "Runs that go on, or can be resumed, use the dataset. Wait for them, or delete them.",
        Reason.TOKENIZER_MISMATCH: "Teacher and student have different tokenizers. Set loss.foreign_tokenizer: alm, or choose others.",
        Reason.TEACHER_CHANGED: "Another model answers than before. Start the first one again, or create a new run.",
        Reason.CACHE_LOCKED: "Another process writes to the cache. Wait for it, or name another path.",
        Reason.CACHE_MISS: "The cache lacks an entry, and no teacher is queried. Build it with the same data and settings.",
    },
    Code.ALREADY_EXISTS: {
        Reason.REQUEST_CONFLICT: "The request_id or output belongs to other input. Choose another.",
        Reason.ADAPTER_CONFLICT: "The adapter's name stands for other weights. Load these under another name.",
    },
    Code.UNAUTHENTICATED: {Reason.UNAUTHENTICATED: "No valid token or certificate. Give --token-file."},
    Code.PERMISSION_DENIED: {
        Reason.PERMISSION_DENIED: "The token lacks the scope. Use one that has it.",
        Reason.PATH_NOT_ALLOWED: "A path lies outside the allowed directories. Start the service with --allow-root for it.",
    },
    Code.UNAVAILABLE: {
        Reason.SERVICE_UNREACHABLE: "No service answers at the address. Start it, or correct the address.",
        Reason.TEACHER_UNREACHABLE: "No teacher answers at the address. Start it, or correct the address.",
        Reason.TEACHER_LOADING: "The teacher still loads its model. Wait.",
        Reason.DRAINING: "The service is stopping. Send the call again once it is back.",
        Reason.DATABASE_UNREACHABLE: "The run service cannot use its database. Check that the database runs; runs continue meanwhile.",
    },
    Code.RESOURCE_EXHAUSTED: {
        Reason.TOO_MANY_CALLS: "Too many calls run at once. Send more in one call, or raise --max-calls.",
        Reason.QUOTA: "A client or an upload takes more than the service allows. Take less, or raise the limit.",
        Reason.ADAPTER_SLOTS: "All adapter slots are taken. Unload one, or raise --max-adapters.",
        Reason.DISK_FULL: "The disk is full. Free some space, then resume.",
        Reason.OUT_OF_MEMORY: "Memory ran out. Resume with smaller passes: `run resume RUN --set optimizer.micro_batch_tokens=N`.",
        Reason.MESSAGE_TOO_LARGE: "A message exceeds gRPC's limit. Send fewer items at once.",
    },
    Code.UNIMPLEMENTED: {Reason.CAPABILITY: "This engine lacks the ability. See `stillhouse teacher info`."},
    Code.DEADLINE_EXCEEDED: {
        Reason.CALL_TIMEOUT: "A call took longer than its deadline. Raise the deadline, or look into the service's log.",
        Reason.ITEM_TIMEOUT: "A sequence took longer than its timeout_ms. Send fewer at once, or raise it.",
    },
    Code.OUT_OF_RANGE: {Reason.CURSOR_EXPIRED: "A position is beyond the end. Start from the beginning."},
    Code.DATA_LOSS: {
        Reason.NON_FINITE: "A loss, gradient or logit is NaN or infinite. Lower optimizer.learning_rate, or use a wider type.",
        Reason.CHECKPOINT_CORRUPT: "A file's digest or content is wrong. Copy it again, or resume from an earlier checkpoint.",
        Reason.EXPORT_FAILED: "A trained student cannot be written so that it computes the same. Its checkpoint is kept; resume exports again.",
        Reason.CACHE_INVALID: "A cache's file is damaged. Find it with `stillhouse cache verify`, and build it again.",
    },
    Code.ABORTED: {Reason.PROCESS_DIED: "A process ended unexpectedly. See its log, then resume or restart."},
    Code.CANCELLED: {Reason.CANCELLED: "The caller cancelled the call. Nothing is left to do."},
    Code.INTERNAL: {Reason.INTERNAL: "A bug. Find log_id in the service's log, and report it."},
}
_CODE_OF = {reason: code for code, row in CATALOG.items() for reason in row}
# The same call may succeed later without a change.
_RETRYABLE = {Reason.TOO_MANY_CALLS, Reason.PROCESS_DIED}.union(
    CATALOG[Code.UNAVAILABLE], CATALOG[Code.DEADLINE_EXCEEDED]
)
_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A problem of one field of a request."""

    field: str
    """Path as in the file, such as `loss.terms[0].divergence`."""
    description: str
    """A sentence with value, limit and remedy."""


class StillhouseError(Exception):
    """An error that a user or another program can cause; its message names value, limit and remedy."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        resource: str | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations: tuple[FieldViolation, ...] = tuple(violations)
        self.retry_after_s = retry_after_s
        self.resource = resource

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code that the catalog gives to this reason."""
        return _CODE_OF[self.reason]

    @property
    def retryable(self) -> bool:
        """True if the same call may succeed later without a change."""
        return self.reason in _RETRYABLE

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickle, (to_status(self).SerializeToString(),))


def _unpickle(data: bytes) -> StillhouseError:
    return from_status(status_pb2.Status.FromString(data))


def to_status(error: BaseException) -> status_pb2.Status:
    """The error as a status for the wire.

    An exception outside the catalog is a bug: it is logged with a log id, and the status holds only that id.
    A cancellation is CANCELLED. For a task group the first error in the catalog counts.
    """
    error = _cause(error)
    if isinstance(error, StillhouseError):
        return _status_of(error)
    if isinstance(error, asyncio.CancelledError):
        return _status_of(StillhouseError(Reason.CANCELLED, "The call was cancelled."))
    log_id = secrets.token_hex(6)
    log.error("internal error", log_id=log_id, exc_info=error)
    return _status_of(
        StillhouseError(
            Reason.INTERNAL,
            f"Something broke inside the service; its log has the cause under log_id {log_id}.",
            metadata={"log_id": log_id},
        )
    )


def _cause(error: BaseException) -> BaseException:
    """The error of a group that explains it best: one of the catalog, else a bug, else a cancellation."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [_cause(each) for each in error.exceptions]
    return min(
        causes,
        key=lambda each: (not isinstance(each, StillhouseError), isinstance(each, asyncio.CancelledError)),
    )


def _status_of(error: StillhouseError) -> status_pb2.Status:
    status = status_pb2.Status(code=error.code.value[0], message=_clean(error.message))
    metadata = {_clean(key): _clean(value) for key, value in error.metadata.items()}
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    )
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(max(0.0, error.retry_after_s) * 1000))
        status.details.add().Pack(retry)
    if error.resource is not None:
        kind = error.reason.removesuffix("_NOT_FOUND").lower()
        resource = error_details_pb2.ResourceInfo(resource_type=kind, resource_name=_clean(error.resource))
        status.details.add().Pack(resource)
    if error.violations:
        status.details.add().Pack(_bad_request(error.violations, MAX_STATUS_BYTES - status.ByteSize()))
    return status


def _bad_request(violations: Sequence[FieldViolation], budget_bytes: int) -> error_details_pb2.BadRequest:
    bad_request = error_details_pb2.BadRequest()
    for index, violation in enumerate(violations):
        one = error_details_pb2.BadRequest.FieldViolation(
            field=_clean(violation.field), description=_clean(violation.description)
        )
        budget_bytes -= one.ByteSize() + 8
        if budget_bytes < 0 and index > 0:
            rest = f"{len(violations) - index} further fields are wrong; correct these first."
            bad_request.field_violations.add(description=rest)
            break
        bad_request.field_violations.append(one)
    return bad_request


def _clean(text: str) -> str:
    """Makes text valid for protobuf and headers: file names may hold bytes that are not UTF-8."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_SENTENCE_CHARS else text[: MAX_SENTENCE_CHARS - 1] + "…"


def from_status(status: status_pb2.Status) -> StillhouseError:
    """The error of a status; unreadable details are skipped.

    An unknown reason becomes the general one of its code, with the unknown name in `metadata["reason"]`.
    """
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    reason: Reason | None = None
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    resource: str | None = None
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        bad_request, about = error_details_pb2.BadRequest(), error_details_pb2.ResourceInfo()
        try:
            if detail.Unpack(info):
                metadata |= dict(info.metadata)
                if info.domain == DOMAIN and info.reason in Reason.__members__:
                    reason = Reason(info.reason)
                else:
                    metadata["reason"] = info.reason
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
            elif detail.Unpack(about):
                resource = about.resource_name
            elif detail.Unpack(bad_request):
                violations += [
                    FieldViolation(field=each.field, description=each.description)
                    for each in bad_request.field_violations
                ]
        except DecodeError:
            continue
    if reason is None:
        reason = next(iter(CATALOG.get(code, (Reason.INTERNAL,))))
    message = status.message or f"The service answered {code.name}."
    return StillhouseError(
        reason,
        message,
        metadata=metadata,
        violations=violations,
        retry_after_s=retry_after_s,
        resource=resource,
    )


def from_rpc_error(error: grpc.RpcError, *, target: str, service: str) -> StillhouseError:
    """The error behind a failed call to `service` ("teacher" or "trainer") at `target`.

    A status with our details is used as it is; one of gRPC itself becomes a sentence with a remedy.
    """
    call: Any = error  # an RpcError raised by a call is also that call
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):
        status = None
    if status is not None:
        return from_status(status)
    code: grpc.StatusCode = call.code()
    said = " ".join((call.details() or "").split())
    plain = from_status(status_pb2.Status(code=code.value[0], message=said))
    reason, message = plain.reason, f"The {service} at {target} answered {code.name}: {said}"
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            reason = Reason.TEACHER_UNREACHABLE if service == "teacher" else Reason.SERVICE_UNREACHABLE
            message = (
                f"No {service} answers at {target} ({said}). Start one with `stillhouse-{service}`, or correct the "
                "address; a service with TLS needs --tls-ca on this side, and one without must not have it."
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"The {service} at {target} did not respond in time. It may be overloaded or hang: see its log."
        case grpc.StatusCode.CANCELLED:
            message = f"The call to the {service} at {target} was cancelled ({said})."
        case grpc.StatusCode.UNIMPLEMENTED:
            message = (
                f"The service at {target} is not a {service} of this version ({said}). Correct the address, or use the same "
                "version of Stillhouse on both sides."
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in said.lower():
            reason = Reason.MESSAGE_TOO_LARGE
            message = f"A message to or from the {service} at {target} is too large ({said}). Send fewer items at once."
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            message = f"The {service} at {target} aborted the call ({said}). Its log has the cause."
        case _:
            pass
    return StillhouseError(reason, message, metadata={"target": target})


def to_json(status: status_pb2.Status) -> dict[str, Any]:
    """The status as JSON values, in protobuf's mapping; details of unknown types are dropped."""
    known = status_pb2.Status(code=status.code, message=status.message)
    for detail in status.details:
        alone = status_pb2.Status(details=[detail])
        try:
            json_format.MessageToDict(alone)
        except (TypeError, DecodeError, json_format.Error):
            continue
        known.details.append(detail)
    plain: dict[str, Any] = json_format.MessageToDict(known)
    return plain


def from_json(plain: Mapping[str, Any]) -> status_pb2.Status:
    """Parses the output of to_json. Raises ValueError for anything else."""
    try:
        status: status_pb2.Status = json_format.ParseDict(
            dict(plain), status_pb2.Status(), ignore_unknown_fields=True
        )
    except (json_format.Error, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not an error record: {error}") from error
    return status


def first_line(error: BaseException) -> str:
    """First line of a foreign error's text, with the next behind a headline that ends with ":"; its type's name without any."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
