"""Buffers rows of generated tokens in vLLM's worker, and releases them in blocks when the front end emits them.

Each array costs the engine's process and the front end more than its contents, and vLLM makes three for every token. The first
runner's rows may leave before they are computed: the thread that encodes vLLM's messages waits for them (plugin.py), no step does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import Deferred
from stillhouse.teacher_service.engines.vllm.worker.request_plan import STREAM_INTERVAL_TOKENS

Array = npt.NDArray[Any]
Columns = Callable[[], tuple[Array, Array]]
"""Returns (ids, values) of a step's rows, which may be computed until then."""
NO_RANKS = np.empty(0, np.int32)


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
        return ids, np.stack([each[at] for _, each, at in steps]), NO_RANKS


def known(ids: Array, values: Array) -> Columns:
    """Columns that are computed already."""
    return lambda: (ids, values)


class Slab:
    """Rows of samples that begin a block in one step: written for many samples at once, read by sample."""

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of rows of each sample."""
        self._capacity = capacity
        self.num_samples = 0
        self.writes: list[Deferred[None]] = []
        """Latest writes, which may not be done; a list is never changed."""
        self._arrays: tuple[Array, Array] | None = None
        self._lock = threading.Lock()

    def expect(self, write: Deferred[None]) -> None:
        """Adds a write by a helper."""
        self.writes = [*(each for each in self.writes if not each.is_done), write]

    def write(self, samples: list[int], counts: list[int], ids: Array, values: Array) -> None:
        """Writes one row of each of these samples, in any thread, once all samples are counted."""
        with self._lock:
            if self._arrays is None:
                shape = self.num_samples, self._capacity
                self._arrays = (
                    np.empty((*shape, ids.shape[1]), ids.dtype),
                    np.empty((*shape, values.shape[1]), values.dtype),
                )
        self._arrays[0][samples, counts] = ids
        self._arrays[1][samples, counts] = values

    def rows(self, part: int, sample: int, count: int) -> Array:
        """First rows of a sample, which are written: ids (0) or values (1)."""
        assert self._arrays is not None
        return self._arrays[part][sample, :count]


class RowsOfSample:
    """A sample's rows since the last that left."""

    def __init__(self, slab: Slab) -> None:
        self.slab, self.sample, self.count = slab, slab.num_samples, 0
        slab.num_samples += 1

    def leave(self, *, pending: bool) -> tuple[Any, Any, Array]:
        """(ids [n, C], values [n, D], no ranks), waited for unless `pending`."""
        ids, values = (PendingArray(part, self) for part in (0, 1))
        return (ids, values, NO_RANKS) if pending else (ids.array(), values.array(), NO_RANKS)


class PendingArray:
    """Ids (0) or values (1) of rows, in the place of an array; no dataclass, which msgspec would encode by itself."""

    def __init__(self, part: int, rows: RowsOfSample) -> None:
        self._part, self._slab, self._sample, self._count = part, rows.slab, rows.sample, rows.count
        self._writes = rows.slab.writes

    def array(self) -> Array:
        """Waits for the rows. Raises the error of their computation."""
        for each in self._writes:
            each.result()
        return self._slab.rows(self._part, self._sample, self._count)


@dataclass(frozen=True, slots=True)
class OutgoingRows:
    """Rows released in one step, in place of vLLM's `LogprobsTensors` and `LogprobsLists`."""

    blocks: dict[int, tuple[Any, Any, Array]]
    """(ids, values, ranks) by index in the batch; ids and values are arrays or `PendingArray`s."""

    def tolists(self) -> OutgoingRows:
        """Called by the runner; returns itself."""
        return self

    def slice_request(self, place: int, num_tokens: int) -> Any:  # noqa: ARG002
        """Called by the scheduler for a request with a new token; None while its rows are buffered."""
        from vllm.v1.outputs import LogprobsLists

        block = self.blocks.get(place)
        return None if block is None else LogprobsLists(*block)


def block_rows(written: int) -> int:
    """Most rows of a sample's block that begins after `written` tokens."""
    return 1 + -written % STREAM_INTERVAL_TOKENS


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
