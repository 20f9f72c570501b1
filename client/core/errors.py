"""Errors of the client: exit codes, places in a user's text, and those of usage and files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import grpc

from stillhouse.protos.errors import CATALOG, FieldViolation, Reason, StillhouseError
from stillhouse.protos.files.disk_errors import FULL
from stillhouse.protos.rows.field_error import FieldError


class ExitCode(IntEnum):
    """Exit code of a command."""

    OK = 0
    """Done; a watched run COMPLETED."""
    FAILED = 1
    """The run or the operation failed, or the server refused it for a reason without its own code."""
    USAGE = 2
    """Invalid usage, run file or value; nothing was changed."""
    UNREACHABLE = 3
    """The service does not respond, or not in time."""
    NOT_FOUND = 4
    """No such run, adapter, dataset or artifact."""
    CONFLICT = 5
    """Not allowed in this state, the name is taken, or a watched run was stopped before its end."""
    INTERRUPTED = 130
    """Ctrl-C."""


@dataclass(frozen=True, slots=True)
class LocatedViolation(FieldViolation):
    """A problem of one field, and its place in the user's own text."""

    line: int = 0
    """Counts from 1; 0 if unknown."""
    column: int = 0
    """Counts from 1; 0 if unknown."""


_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
    grpc.StatusCode.OUT_OF_RANGE: ExitCode.USAGE,
    grpc.StatusCode.UNAVAILABLE: ExitCode.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.UNREACHABLE,
    grpc.StatusCode.NOT_FOUND: ExitCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION: ExitCode.CONFLICT,
    grpc.StatusCode.ALREADY_EXISTS: ExitCode.CONFLICT,
    grpc.StatusCode.ABORTED: ExitCode.CONFLICT,
}


def exit_code(error: StillhouseError) -> ExitCode:
    """Returns the exit code of a command that ends with `error`."""
    return _BY_STATUS.get(error.code, ExitCode.FAILED)


def explain(reason: Reason) -> tuple[str, str]:
    """Returns meaning and remedy of a reason, each a text of whole sentences."""
    text = next(reasons[reason] for reasons in CATALOG.values() if reason in reasons)
    meaning, _, remedy = text.partition(". ")
    return f"{meaning}.", remedy


def usage_error(message: str) -> StillhouseError:
    """Returns an error for an invalid value from the user, found without a service."""
    return StillhouseError(Reason.INVALID_REQUEST, message)


def file_error(verb: str, path: object, error: OSError) -> StillhouseError:
    """Returns an error for a user's file that cannot be read or written."""
    return usage_error(f"cannot {verb} {path}: {os_reason(error)}.")


def os_reason(error: OSError) -> str:
    """Returns the system's words for an error, and for a full disk the remedy."""
    remedy = "; free some space there, or name another place" if error.errno in FULL else ""
    return f"{error.strerror or error}{remedy}"


@contextmanager
def file_errors(verb: str, path: object) -> Iterator[None]:
    """Raises an OSError of the block as file_error() does."""
    try:
        yield
    except OSError as error:
        raise file_error(verb, path, error) from error


@contextmanager
def field_errors(where: str = "") -> Iterator[None]:
    """Raises a FieldError of the block as a usage error; `where` precedes its sentence."""
    try:
        yield
    except FieldError as error:
        raise usage_error(f"{where}{error}") from error
