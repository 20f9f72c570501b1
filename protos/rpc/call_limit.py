"""Limits calls in progress, in total and by client, so that one client always leaves room for another.

A client's share is a multiple of what is free (dynamic thresholds: Choudhury and Hahne, 1998): three quarters alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import grpc

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.client_identity import client_of
from stillhouse.protos.rpc.interceptor_base import Behaviour, RpcInterceptor, respond, with_behaviour

MULTIPLE = 3
"""A client may hold this many times what it leaves free: alone three quarters, one of two three sevenths."""
BUSY_RETRY_S = 1.0


def may_hold(held: int, free: int, more: int) -> bool:
    """True if a client that holds `held` may take `more` of what is free."""
    return more <= free and held < MULTIPLE * free


class CallLimit(RpcInterceptor):
    """Refuses calls beyond the limit with TOO_MANY_CALLS. Stands after authentication, which names the client."""

    def __init__(self, max_calls: int, *, methods: Collection[str] | None = None) -> None:
        """`methods` are full names of the rpcs that count; None means all but health and reflection."""
        self._max_calls, self._methods = max_calls, methods
        self.calls: Counter[str] = Counter()
        """Calls in progress by client."""

    def wrap_handler(self, handler: Any, details: grpc.HandlerCallDetails) -> Any:
        """The handler, which takes a call only below the limit."""
        if self._methods is not None and details.method not in self._methods:
            return handler

        def limited(behaviour: Behaviour) -> Behaviour:
            async def wrapped(request: Any, context: Any) -> Any:
                client = client_of(context)
                self._admit(client)
                self.calls[client] += 1
                try:
                    return await respond(behaviour, request, context)
                finally:
                    self.calls[client] -= 1
                    if not self.calls[client]:
                        del self.calls[client]

            return wrapped

        return with_behaviour(handler, limited)

    def _admit(self, client: str) -> None:
        own, running = self.calls[client], self.calls.total()
        if not may_hold(own, self._max_calls - running, 1):
            raise StillhouseError(
                Reason.TOO_MANY_CALLS,
                f"{running} calls are running, {own} of them yours; this service takes {self._max_calls} and keeps room "
                "for other clients. End some, send more in one call, or start the service with a larger --max-calls.",
                retry_after_s=BUSY_RETRY_S,
            )
