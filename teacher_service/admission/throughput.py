"""Tokens of each client in the last minute, counted in slices of time: bounded memory, whatever names clients send."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

WINDOW_S = 60.0
"""Time over which rates are means."""
SLICE_S = 5.0
MAX_CLIENTS = 1000
"""Clients counted in a slice; tokens of further ones count as those of OTHERS."""
OTHERS = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Tokens of one client in a second."""

    scored_per_s: float = 0.0
    generated_per_s: float = 0.0


@dataclass(slots=True)
class _Slice:
    begin_s: float
    counts: dict[str, list[int]] = field(default_factory=dict)
    """[scored, generated] by client."""


class Throughput:
    """Counts tokens by client. Bound to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slices: deque[_Slice] = deque()
        self._began_s = clock()

    @property
    def uptime_s(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._began_s

    @property
    def window_s(self) -> float:
        """Time over which the rates are means."""
        return min(WINDOW_S, max(SLICE_S, self.uptime_s))

    def scored(self, client: str, tokens: int) -> None:
        """Counts scored tokens."""
        self._counts(client)[0] += tokens

    def generated(self, client: str, tokens: int) -> None:
        """Counts generated tokens."""
        self._counts(client)[1] += tokens

    def rates(self) -> Mapping[str, Rates]:
        """Rates of the clients that had tokens in the window."""
        self._drop_old()
        totals: dict[str, list[int]] = {}
        for each in self._slices:
            for client, (scored, generated) in each.counts.items():
                total = totals.setdefault(client, [0, 0])
                total[0] += scored
                total[1] += generated
        window_s = self.window_s
        return {
            client: Rates(scored_per_s=scored / window_s, generated_per_s=generated / window_s)
            for client, (scored, generated) in totals.items()
        }

    def _counts(self, client: str) -> list[int]:
        now_s = self._clock()
        if not self._slices or now_s - self._slices[-1].begin_s >= SLICE_S:
            self._drop_old()
            self._slices.append(_Slice(now_s))
        counts = self._slices[-1].counts
        if client not in counts and len(counts) >= MAX_CLIENTS:
            client = OTHERS
        return counts.setdefault(client, [0, 0])

    def _drop_old(self) -> None:
        now_s = self._clock()
        while self._slices and now_s - self._slices[0].begin_s >= WINDOW_S:
            self._slices.popleft()
