"""What a finished call was: the one record from which audit log and metrics are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_WHAT_CHARS = 200
OK = "OK"
_NAMING = ("name", "adapter", "path", "file_name", "request_id")
"""Fields of requests and answers that say what a call was about, the best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls, as far as the service could check it."""

    name: str
    """Of the token, or the common name of the certificate with "certificate:" before it; empty if nobody proved anything."""
    is_admin: bool
    """Whether everything is allowed: to tokens with that scope, and to all where no tokens are demanded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallRecord:
    """A call that has ended."""

    method: str
    """Full name of the rpc, such as "/stillhouse.v1.RunService/StopRun"."""
    caller: Caller
    peer: str
    """Address, as gRPC writes it."""
    what: str
    """Run, adapter or dataset that it was about; empty if none can be told."""
    outcome: str
    """OK, or the reason of the error, such as PERMISSION_DENIED."""
    seconds: float
    """From its arrival to its end."""


Observer = Callable[[CallRecord], None]


def resource_of(*messages: object) -> str:
    """The run, adapter or dataset that a request or its answer names; empty if none does."""
    for field in _NAMING:
        for message in messages:
            value = getattr(message, field, None)
            if isinstance(value, str) and value:
                return value[:MAX_WHAT_CHARS]
    return ""
