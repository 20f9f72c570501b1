"""Parts that the handlers of requests share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from stillhouse.client.trainer.run_handle import ENDED
from stillhouse.client.web.security.callers import Caller, Callers
from stillhouse.client.web.settings import WebSettings
from stillhouse.client.web.streams.shared import SharedStream, SharedStreams
from stillhouse.client.web.upstream import CALL_TIMEOUT_S, Upstream
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import GetRunRequest, Run

END_S = 5.0
"""Time in which the stream of an ended run ends."""
READER_CHECK_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WebContext:
    """Services, callers and open streams of one server."""

    settings: WebSettings
    upstream: Upstream
    callers: Callers
    streams: SharedStreams = field(default_factory=SharedStreams)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server stops: streams end."""

    def is_over(self, caller: Caller) -> bool:
        """True if streams of `caller` are to end."""
        return self.closing.is_set() or (caller.session is not None and caller.session.over)

    def close_streams(self) -> None:
        """Ends the streams of all readers."""
        self.closing.set()
        self.streams.wake()

    async def nothing_follows(self, run: Run, stream: SharedStream, cursor: int) -> bool:
        """True if `run` has ended, and its stream has nothing behind `cursor`."""
        if run.state not in ENDED:
            return False
        deadline_s = time.monotonic() + END_S
        while not stream.ended and stream.failed is None and time.monotonic() < deadline_s:
            await stream.changed(END_S)
        return stream.ended and cursor >= (stream.position or 0)

    async def position_of(self, stream: SharedStream) -> int:
        """The position of a stream, once it has one. Raises StillhouseError if it fails before, or takes too long."""
        deadline_s = time.monotonic() + CALL_TIMEOUT_S
        while stream.position is None:
            if stream.failed is not None:
                raise stream.failed
            if stream.ended:
                return 0
            if self.closing.is_set():
                raise StillhouseError(Reason.DRAINING, "This server is stopping.", retry_after_s=2.0)
            if time.monotonic() > deadline_s:
                raise StillhouseError(
                    Reason.CALL_TIMEOUT,
                    f"The run service at {self.upstream.trainer.target} sent nothing of the stream for "
                    f"{CALL_TIMEOUT_S:g} s. Look into its log.",
                )
            await stream.changed(1.0)
        return stream.position

    async def check_reader(self, caller: Caller, name: str) -> None:
        """Raises StillhouseError if `caller` may no longer read the run `name`; not if nobody can tell."""
        request = GetRunRequest(name=name)
        try:
            await caller.call(self.upstream.trainer, "GetRun", request, timeout_s=READER_CHECK_TIMEOUT_S)
        except StillhouseError as error:
            if error.reason in (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED):
                raise
