"""Byte alignment of two tokenisations of one text into chunks: the shortest spans at whose ends tokens of both sides end.

Positions are byte offsets in the text; a special token takes one byte. Axes: n student tokens, m teacher tokens,
B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Chunks(NamedTuple):
    """Chunk index of each token, counted from 0 in text order; -1 for tokens outside of chunks."""

    student: NDArray[np.int32]
    """[n]."""
    teacher: NDArray[np.int32]
    """[m]."""
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """One side's tokens."""

    ends: NDArray[np.int64]
    """[n]: end offset of each token, never decreasing; a token that ends where the last one did stands for no text."""
    counts: NDArray[np.bool_]
    """[n]: True if the token's log-probability may be used."""
    closes: NDArray[np.bool_] | None = None
    """[n]: True if the end offset is exact; False where a token may share a character with the next. None: all exact."""


def align(
    student: Tokens,
    teacher: Tokens,
    *,
    missing: NDArray[np.bool_],
    cuts: NDArray[np.int64],
    stops: NDArray[np.bool_] | None = None,
) -> Chunks:
    """Returns the chunks all of whose tokens count on both sides.

    `missing` [B] marks bytes that the teacher does not see: chunks with one are left out. At `cuts` the teacher's text
    is cut, even inside a token. `stops` [B + 1], if given, are the only offsets besides `cuts` where a chunk may end.
    Text before the first token of both sides belongs to no chunk.
    """
    ours, theirs, at_cuts = (np.zeros(len(missing) + 1, np.bool_) for _ in range(3))
    ours[student.ends] = True
    theirs[teacher.ends if teacher.closes is None else teacher.ends[teacher.closes]] = True
    at_cuts[cuts] = True
    at_both = ours & (theirs | at_cuts)
    if stops is not None:
        at_both &= stops | at_cuts
    at_both[0] = True  # chunk k is (boundaries[k - 1], boundaries[k]]; tokens that end at 0 are in none
    boundaries = np.flatnonzero(at_both)
    student_chunks = _enclosing_chunks(student, boundaries)
    teacher_chunks = _enclosing_chunks(teacher, boundaries)
    num_missing = np.concatenate([[0], np.cumsum(missing)])[boundaries]
    complete = np.zeros(len(boundaries), np.bool_)
    complete[1:] = np.diff(num_missing) == 0
    for side, chunk_of in ((student, student_chunks), (teacher, teacher_chunks)):
        usable = np.zeros(len(boundaries) + 1, np.bool_)
        usable[chunk_of] = True
        usable[chunk_of[~side.counts]] = False
        complete &= usable[:-1]
    number = np.full(len(boundaries) + 1, -1, np.int32)
    number[:-1][complete] = np.arange(complete.sum())
    return Chunks(number[student_chunks], number[teacher_chunks], int(complete.sum()))


def _enclosing_chunks(side: Tokens, boundaries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the index of the first boundary at or after each token's end, [n]; len(boundaries) after the last one."""
    return np.searchsorted(boundaries, side.ends, side="left").astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedText:
    """A text in the tokens of a teacher with another tokenizer, aligned with the student's n tokens."""

    token_ids: NDArray[np.int32]
    """[m], of the teacher's tokenizer."""
    chunks: Chunks
    """At least one; the first begins after the teacher's first token."""

    @property
    def start(self) -> int:
        """Index of the first teacher token in a chunk, >= 1: the first queried position."""
        return int(np.argmax(self.chunks.teacher >= 0))

    def logprobs(self, target_logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Sums a teacher's target_logprobs [m - start] by chunk, [chunks]; rounding above 0 is clipped."""
        chunk_of = self.chunks.teacher[self.start :]
        inside = chunk_of >= 0
        sums = np.bincount(
            chunk_of[inside], weights=target_logprobs[inside].astype(np.float64), minlength=self.chunks.number
        )
        return np.minimum(sums, 0.0)
