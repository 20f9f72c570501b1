"""Slices and joins chunks of one sample: tokens with their log-probabilities and distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import Finish, GeneratedChunk


def num_bytes(chunk: GeneratedChunk) -> int:
    """Upper bound of the arrays' bytes on the wire."""
    return len(chunk.token_ids) * _token_bytes(chunk)


def slice_chunk(chunk: GeneratedChunk, begin: int, end: int, finish: Finish) -> GeneratedChunk:
    """Tokens [begin, end) of a chunk, with this finish."""
    return GeneratedChunk(
        token_ids=chunk.token_ids[begin:end],
        sampling_logprobs=chunk.sampling_logprobs[begin:end],
        distributions=None if chunk.distributions is None else chunk.distributions.rows(begin, end),
        finish=finish,
    )


def join(chunks: Sequence[GeneratedChunk]) -> GeneratedChunk:
    """Joins adjacent chunks of one sample, at least one; the finish is the last one's."""
    if len(chunks) == 1:
        return chunks[0]
    parts = [chunk.distributions for chunk in chunks if chunk.distributions is not None]
    return GeneratedChunk(
        token_ids=np.concatenate([chunk.token_ids for chunk in chunks]),
        sampling_logprobs=np.concatenate([chunk.sampling_logprobs for chunk in chunks]),
        distributions=Distributions.concat(parts) if parts else None,
        finish=chunks[-1].finish,
    )


def cut(chunk: GeneratedChunk, max_bytes: int) -> Iterator[GeneratedChunk]:
    """Cuts a chunk into parts of at most `max_bytes`, but at least one token; only the last has its finish."""
    step = max(1, max_bytes // _token_bytes(chunk))
    length = len(chunk.token_ids)
    if length <= step:
        yield chunk
        return
    for begin in range(0, length, step):
        end = min(begin + step, length)
        yield slice_chunk(chunk, begin, end, chunk.finish if end == length else "")


def _token_bytes(chunk: GeneratedChunk) -> int:
    return 8 + (0 if chunk.distributions is None else chunk.distributions.row_bytes)


@dataclass(slots=True)
class PendingChunks:
    """Generated tokens withheld from the caller, since they may belong to a stop string."""

    _chunks: list[GeneratedChunk] = field(default_factory=list)
    _num_released: int = 0

    def add(self, chunk: GeneratedChunk) -> None:
        """Appends the next chunk of the sample."""
        self._chunks.append(chunk)

    def release(self, num_kept: int, finish: Finish) -> GeneratedChunk:
        """Releases the tokens up to the sample's first `num_kept` that were not released before, with this finish."""
        held = join(self._chunks)
        count = num_kept - self._num_released
        self._num_released = num_kept
        if count == len(held.token_ids):
            self._chunks = []
            return held if held.finish == finish else replace(held, finish=finish)
        rest = slice_chunk(held, count, len(held.token_ids), "")
        self._chunks = [rest] if len(rest.token_ids) else []
        return replace(slice_chunk(held, 0, count, ""), finish=finish)
