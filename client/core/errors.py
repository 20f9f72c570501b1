"""Exit codes of the client: one table from what went wrong to the number that a script sees."""

from __future__ import annotations

from enum import IntEnum

import grpc

from stillhouse.protos.errors import Reason, StillhouseError


class ExitCode(IntEnum):
    """What a command's exit code says."""

    OK = 0
    """Done; a watched run COMPLETED."""
    FAILED = 1
    """The run or the operation failed; also: refused by the server for a reason without a code of its own."""
    USAGE = 2
    """Bad usage, run file or value; nothing was changed."""
    UNREACHABLE = 3
    """The service does not answer, or not in time."""
    NOT_FOUND = 4
    """No such run, adapter, dataset or artifact."""
    CONFLICT = 5
    """The state forbids it, the name is taken, or a watched run was stopped before its end."""
    INTERRUPTED = 130
    """Ctrl-C."""


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
    """The exit code of a command that ends with `error`."""
    return _BY_STATUS.get(error.code, ExitCode.FAILED)


def usage_error(message: str) -> StillhouseError:
    """An error for a value that the user gave and that no service has seen."""
    return StillhouseError(Reason.INVALID_REQUEST, message)


def file_error(verb: str, path: object, error: OSError) -> StillhouseError:
    """A sentence for a file of the user's that cannot be read or written."""
    return usage_error(f"cannot {verb} {path}: {error.strerror or error}.")
