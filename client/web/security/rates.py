"""Rate limits: token buckets by client, in bounded memory."""

from __future__ import annotations

import time
from collections import OrderedDict

from stillhouse.protos.errors import Reason, StillhouseError

MAX_CLIENTS = 10_000


class RateLimit:
    """Lets each client make `burst` requests at once and `per_s` a second on average."""

    def __init__(self, what: str, *, per_s: float, burst: int) -> None:
        """`what` names the requests in the error."""
        self._what, self._per_s, self._burst = what, per_s, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, client: str) -> float:
        """Returns how many requests the client has left, one at least. Raises StillhouseError(TOO_MANY_CALLS)."""
        left, seen_s = self._buckets.get(client, (float(self._burst), time.monotonic()))
        left = min(float(self._burst), left + (time.monotonic() - seen_s) * self._per_s)
        if left < 1:
            wait_s = (1 - left) / self._per_s
            raise StillhouseError(
                Reason.TOO_MANY_CALLS,
                f"This client sends too many {self._what}: more than {self._burst} at once and {self._per_s:g} a second. "
                f"Wait {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )
        return left

    def take(self, client: str) -> None:
        """Counts a request. Raises as `check` does."""
        self._buckets[client] = self.check(client) - 1, time.monotonic()
        self._buckets.move_to_end(client)
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
