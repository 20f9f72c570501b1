"""Cuts and joins what an engine writes of one sample: tokens, their log-probabilities and their distributions together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import Finish, GeneratedPiece

_EMPTY = GeneratedPiece(token_ids=np.zeros(0, np.int32), sampling_logprobs=np.zeros(0, np.float32))


def num_bytes(piece: GeneratedPiece) -> int:
    """The most bytes that its arrays take on the wire."""
    return len(piece.token_ids) * _token_bytes(piece)


def rows(piece: GeneratedPiece, begin: int, end: int, finish: Finish) -> GeneratedPiece:
    """Tokens [begin, end) of a piece, with this finish."""
    return GeneratedPiece(
        token_ids=piece.token_ids[begin:end],
        sampling_logprobs=piece.sampling_logprobs[begin:end],
        distributions=None if piece.distributions is None else piece.distributions.rows(begin, end),
        finish=finish,
    )


def join(pieces: Sequence[GeneratedPiece]) -> GeneratedPiece:
    """Adjacent pieces of one sample as one; the last one's finish."""
    if not pieces:
        return _EMPTY
    if len(pieces) == 1:
        return pieces[0]
    parts = [piece.distributions for piece in pieces if piece.distributions is not None]
    return GeneratedPiece(
        token_ids=np.concatenate([piece.token_ids for piece in pieces]),
        sampling_logprobs=np.concatenate([piece.sampling_logprobs for piece in pieces]),
        distributions=Distributions.concat(parts) if parts else None,
        finish=pieces[-1].finish,
    )


def cut(piece: GeneratedPiece, max_bytes: int) -> Iterator[GeneratedPiece]:
    """The piece in parts of at most `max_bytes`, but of one token at least; only the last has its finish."""
    step = max(1, max_bytes // _token_bytes(piece))
    length = len(piece.token_ids)
    if length <= step:
        yield piece
        return
    for begin in range(0, max(1, length), step):
        end = min(begin + step, length)
        yield rows(piece, begin, end, piece.finish if end == length else "")


def _token_bytes(piece: GeneratedPiece) -> int:
    return 8 + (0 if piece.distributions is None else piece.distributions.row_bytes)


@dataclass(slots=True)
class Held:
    """What a sample has written and not given out: it may turn out to belong to a stop string."""

    _pieces: list[GeneratedPiece] = field(default_factory=list)
    _num_given: int = 0

    def add(self, piece: GeneratedPiece) -> None:
        """Takes the next piece of the sample."""
        self._pieces.append(piece)

    def give(self, num_kept: int, finish: Finish) -> GeneratedPiece:
        """The tokens up to the sample's first `num_kept` that were not given out before, with this finish."""
        held = join(self._pieces)
        count = num_kept - self._num_given
        self._num_given = num_kept
        if count == len(held.token_ids):
            self._pieces = []
            return held if held.finish == finish else replace(held, finish=finish)
        rest = rows(held, count, len(held.token_ids), "")
        self._pieces = [rest] if len(rest.token_ids) else []
        return replace(rows(held, 0, count, ""), finish=finish)
