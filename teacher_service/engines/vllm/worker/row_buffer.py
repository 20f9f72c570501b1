"""Buffers rows of generated tokens in vLLM's worker, and releases them in blocks when the front end emits them.

Each array costs the engine's process and the front end more than its contents, and vLLM makes three for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.teacher_service.engines.vllm.worker.request_plan import STREAM_INTERVAL_TOKENS

Array = npt.NDArray[Any]
Columns = Callable[[], tuple[Array, Array]]
"""Returns (ids, values) of a step's rows, which may be computed until then."""
_NO_RANKS = np.empty(0, np.int32)


@dataclass(slots=True)
class RowBuffer:
    """Unreleased rows of one sample: for each its step's columns, and its index in them."""

    rows: list[tuple[Columns, int]] = field(default_factory=list)

    def drain(self, count: int | None = None) -> tuple[Array, Array, Array]:
        """Returns and removes the first `count` rows, or all: (ids [n, C], values [n, D], no ranks)."""
        rows = self.rows[:count]
        del self.rows[: len(rows)]
        steps = [(*columns(), at) for columns, at in rows]
        ids = np.stack([each[at] for each, _, at in steps])
        return ids, np.stack([each[at] for _, each, at in steps]), _NO_RANKS


def known(ids: Array, values: Array) -> Columns:
    """Columns that are computed already."""
    return lambda: (ids, values)


@dataclass(frozen=True, slots=True)
class OutgoingRows:
    """Rows released in one step, in place of vLLM's `LogprobsTensors` and `LogprobsLists`."""

    blocks: dict[int, tuple[Array, Array, Array]]
    """(ids, values, ranks) by index in the batch."""

    def tolists(self) -> OutgoingRows:
        """Called by the runner; returns itself."""
        return self

    def slice_request(self, place: int, num_tokens: int) -> Any:  # noqa: ARG002
        """Called by the scheduler for a request with a new token; None while its rows are buffered."""
        from vllm.v1.outputs import LogprobsLists

        block = self.blocks.get(place)
        return None if block is None else LogprobsLists(*block)


def is_due(params: Any, token: int, *, written: int, room: int) -> bool:
    """True if the front end emits a sample's rows with this token, its next after `written` tokens.

    `room` is vLLM's limit for the sample's tokens beside `max_tokens`. The front end emits at the first token, at every
    STREAM_INTERVAL_TOKENS after it, and at the last; rows released earlier would wait there.
    """
    return (
        written % STREAM_INTERVAL_TOKENS == 0
        or written + 1 >= min(params.max_tokens, room)
        or token in (params.stop_token_ids or ())
        or token == params.eos_token_id
    )
