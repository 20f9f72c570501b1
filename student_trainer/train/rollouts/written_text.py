"""A text that a rollout service writes, from the pieces in which it comes: what there is of it is a text too.

Axes: N tokens of a piece, Q likeliest ids, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoResponse, SampleChunk
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, decode, decode_distributions
from stillhouse.student_trainer.train.rollouts.local_sampler import PART_TOKENS, SampledText
from stillhouse.student_trainer.train.rollouts.token_sampler import POINTS_PER_DRAW

_THINNING_STREAM = 7
"""Separates these random numbers from those of texts."""
_MAX_DISTANCE = 2**30
_ID_BYTES = 4
_SPARE_PIECES = 2
"""Pieces of a text beyond one for each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceReader:
    """Reads the pieces that one service sends."""

    target: str
    info: GetTeacherInfoResponse
    vocab_size: int
    """Ids that the teacher knows."""
    num_likeliest: int
    end_ids: Sequence[int]
    """Ids that end a text: those of the data, of which the service may know the base's alone."""

    def read(self, chunk: SampleChunk, generator: np.random.Generator) -> SampledText | None:
        """The tokens of a piece, up to the first end, None if it has none; draws count as drawn from all columns of the service."""
        int32, float32 = (Tensor.DATA_TYPE_INT32,), (Tensor.DATA_TYPE_FLOAT32,)
        token_ids = decode(chunk.token_ids, field="token_ids", dtypes=int32, shape=(None,))
        if not token_ids.size:
            return None
        if not chunk.HasField("sampling_logprobs"):
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The rollout service at {self.target} ({self.info.engine}) gives no log-probabilities of the "
                "tokens that it sampled. Use temperature 1 and top_p 1, or start it with --engine hf.",
                metadata={"capability": "sampling_logprobs"},
            )
        logprobs = decode(chunk.sampling_logprobs, field="sampling_logprobs", dtypes=float32, shape=(None,))
        rows = decode_distributions(
            chunk.distributions,
            vocab_size=self.info.vocab_size,
            max_rows=len(token_ids),
            max_top_k=self.num_likeliest,
        )
        if not len(token_ids) == len(logprobs) == rows.num_rows:
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The service at {self.target} sent a text whose parts differ in length.",
            )
        draws, draw_logprobs = distinct_draws(rows, generator)
        ends = np.flatnonzero(np.isin(token_ids, self.end_ids))
        length = int(ends[0]) + 1 if ends.size else len(token_ids)
        return SampledText(
            token_ids=token_ids[:length].astype(np.int32),
            logprobs=logprobs[:length].astype(np.float32),
            likeliest=self._known(rows.token_ids[:length]),
            draws=self._known(draws[:length]),
            draw_logprobs=draw_logprobs[:length],
            finished=bool(ends.size),
        )

    def _known(self, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ids, with -1 in the place of those that the teacher does not know."""
        return np.where(token_ids < self.vocab_size, token_ids, -1).astype(np.int32)


class WrittenText:
    """The pieces of one text so far."""

    def __init__(
        self, reader: PieceReader, seed: int, sample: int, *, num_draws: int, max_new_tokens: int
    ) -> None:
        """`seed` is the prompt's; of `num_draws` columns of draws and `max_new_tokens` the service was asked for."""
        self._reader = reader
        self._num_draws, self._max_new_tokens = num_draws, max_new_tokens
        self._generator = np.random.Generator(np.random.PCG64([seed, sample, _THINNING_STREAM]))
        self._pieces: list[SampledText] = []
        self._num_tokens = self._num_taken = 0
        self._num_chunks = self._num_sent = 0
        self._has_ended = False

    @property
    def has_part(self) -> bool:
        """True if a part of PART_TOKENS has come since the last text that was taken, and the text goes on."""
        return not self._has_ended and self._num_tokens - self._num_taken >= PART_TOKENS

    def add(self, chunk: SampleChunk) -> None:
        """Adds the next piece. Raises StillhouseError, also for a text that is longer than what was asked for, and might never end."""
        self._num_chunks += 1
        self._num_sent += len(chunk.token_ids.data) // _ID_BYTES
        if self._num_sent > self._max_new_tokens or self._num_chunks > self._max_new_tokens + _SPARE_PIECES:
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The service at {self._reader.target} sent {self._num_chunks} parts with {self._num_sent} tokens of one text; "
                f"at most {self._max_new_tokens} were asked for.",
            )
        if self._has_ended:
            return
        piece = self._reader.read(chunk, self._generator)
        if piece is not None:
            self._pieces.append(piece)
            self._num_tokens += len(piece.token_ids)
        self._has_ended = chunk.finish_reason == SampleChunk.FINISH_REASON_STOP or (
            piece is not None and piece.finished
        )

    def text(self) -> SampledText:
        """All tokens so far. Raises StillhouseError(TENSOR_INVALID) without one."""
        if not self._pieces:
            raise StillhouseError(
                Reason.TENSOR_INVALID, f"The service at {self._reader.target} sent a text without tokens."
            )
        self._num_taken = self._num_tokens
        width = max(each.draws.shape[1] for each in self._pieces)
        draws = np.concatenate([_widened(each.draws, width, -1) for each in self._pieces])
        logprobs = np.concatenate([_widened(each.draw_logprobs, width, 0) for each in self._pieces])
        # Fewer columns: each stands for a larger share of all.
        wider = np.float32(math.log(max(1, self._num_draws) / max(1, width)))
        return SampledText(
            token_ids=np.concatenate([each.token_ids for each in self._pieces]),
            logprobs=np.concatenate([each.logprobs for each in self._pieces]),
            likeliest=np.concatenate([each.likeliest for each in self._pieces]),
            draws=draws,
            draw_logprobs=np.where(draws >= 0, logprobs + wider, np.float32(0)),
            finished=self._has_ended,
        )


def distinct_draws(
    rows: Distributions, generator: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Distinct ids of a service's stratified draws, [N, R'] ascending, -1 where there are fewer, with the logs of their mean shares.

    The draws of a position are points at equal distances on the line of its tail. As in `token_sampler`, each id under one counts
    once, and points may be at most POINTS_PER_DRAW times as many as draws on the whole line: of a smaller tail every n-th one is
    taken, from a random one on. Empty without draws.
    """
    ids_NR, logprobs_NR = rows.sampled_token_ids, rows.sampled_logprobs
    num_rows = rows.num_rows
    if ids_NR is None or logprobs_NR is None or not ids_NR.size:
        return np.empty((num_rows, 0), np.int32), np.empty((num_rows, 0), np.float32)
    num_draws = ids_NR.shape[1]
    with np.errstate(divide="ignore", over="ignore"):
        distances = np.floor(1 / (POINTS_PER_DRAW * np.exp(rows.log_tail.astype(np.float64))))
    distances_N = distances.clip(1, _MAX_DISTANCE).astype(np.int64)
    first_N = np.floor(generator.random(num_rows) * distances_N).astype(np.int64)
    columns_R = np.arange(num_draws)
    is_point_NR = (columns_R - first_N[:, None]) % distances_N[:, None] == 0
    is_point_NR &= columns_R >= first_N[:, None]
    # Draws from an empty tail are of all tokens and mean nothing.
    is_point_NR &= np.isfinite(rows.log_tail)[:, None]
    row, column = np.nonzero(is_point_NR)
    ids = ids_NR[row, column]
    is_new = np.ones(len(ids), np.bool_)
    is_new[1:] = (ids[1:] != ids[:-1]) | (row[1:] != row[:-1])
    row, column, ids = row[is_new], column[is_new], ids[is_new]
    counts_N = np.bincount(row, minlength=num_rows)
    place = np.arange(len(row)) - np.repeat(counts_N.cumsum() - counts_N, counts_N)
    width = int(counts_N.max(initial=0))
    draws = np.full((num_rows, width), -1, np.int32)
    shares = np.zeros((num_rows, width), np.float32)
    draws[row, place] = ids
    # Points under an id in the mean; one that has as many as are between two that are taken is drawn for certain.
    points = logprobs_NR[row, column] - rows.log_tail[row] + math.log(num_draws) - np.log(distances_N[row])
    shares[row, place] = np.minimum(points, 0.0) - math.log(num_draws)
    return draws, shares


def _widened(columns: NDArray[np.generic], width: int, value: int) -> NDArray[np.generic]:
    return np.pad(columns, ((0, 0), (0, width - columns.shape[1])), constant_values=value)
