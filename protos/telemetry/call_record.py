"""Record of a finished call, from which audit log and metrics are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_WHAT_CHARS = 200
OK = "OK"
_NAMING = ("name", "adapter", "path", "file_name", "request_id")
"""Fields of requests and responses that name the resource of a call, most specific first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Authenticated caller of an rpc."""

    name: str
    """Name of the token, or "certificate:" and the common name; empty for an unauthenticated caller."""
    is_admin: bool
    """True for tokens with the scope admin, and for all callers where no tokens are required."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallRecord:
    """A call that has ended."""

    method: str
    """Full rpc name, such as "/stillhouse.v1.RunService/StopRun"."""
    caller: Caller
    peer: str
    """Address in gRPC's notation."""
    what: str
    """Run, adapter or dataset of the call; empty if there is none."""
    outcome: str
    """OK, or the reason of the error, such as PERMISSION_DENIED."""
    seconds: float
    """Duration from arrival to end."""


Observer = Callable[[CallRecord], None]


def resource_of(*messages: object) -> str:
    """The run, adapter or dataset that a request or its response names; empty if none."""
    for field in _NAMING:
        for message in messages:
            value = getattr(message, field, None)
            if isinstance(value, str) and value:
                return value[:MAX_WHAT_CHARS]
    return ""
