"""Two tokenisations of one text, cut into chunks: the shortest stretches at whose two ends tokens of both sides end.

Positions are bytes, counted from the beginning of the text; a mark that stands for no text takes one. n student's tokens,
m teacher's tokens, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Chunks(NamedTuple):
    """Which chunk each token belongs to, counted from 0 in the order of the text; -1 for tokens that are left out."""

    student: NDArray[np.int32]
    """[n]."""
    teacher: NDArray[np.int32]
    """[m]."""
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """One side's tokens."""

    ends: NDArray[np.int64]
    """[n]: where each ends, never decreasing. One that ends where the last one did stands for no text."""
    counts: NDArray[np.bool_]
    """[n]: whether its log-probability may be used."""
    closes: NDArray[np.bool_] | None = None
    """[n]: whether its end is known to be one: False where a token may have a share of what follows. None: all do."""


def align(
    student: Tokens,
    teacher: Tokens,
    *,
    missing: NDArray[np.bool_],
    cuts: NDArray[np.int64],
    stops: NDArray[np.bool_] | None = None,
) -> Chunks:
    """The chunks all of whose tokens count on both sides.

    `missing` [B] are bytes that the teacher does not read: chunks that have one are left out. At `cuts` the teacher's text
    is cut, whether or not one of its tokens ends there. `stops` [B + 1], if given, are the only places where a chunk may
    end beside `cuts`. What stands before the first token of both sides belongs to no chunk.
    """
    ours, theirs, at_cuts = (np.zeros(len(missing) + 1, np.bool_) for _ in range(3))
    ours[student.ends] = True
    theirs[teacher.ends if teacher.closes is None else teacher.ends[teacher.closes]] = True
    at_cuts[cuts] = True
    here = ours & (theirs | at_cuts)
    if stops is not None:
        here &= stops | at_cuts
    here[0] = True  # chunk k is (boundaries[k - 1], boundaries[k]]; what ends at 0 is in none
    boundaries = np.flatnonzero(here)
    of_student = _places(student, boundaries)
    of_teacher = _places(teacher, boundaries)
    num_missing = np.concatenate([[0], np.cumsum(missing)])[boundaries]
    good = np.zeros(len(boundaries), np.bool_)
    good[1:] = np.diff(num_missing) == 0
    for side, places in ((student, of_student), (teacher, of_teacher)):
        present = np.zeros(len(boundaries) + 1, np.bool_)
        present[places] = True
        present[places[~side.counts]] = False
        good &= present[:-1]
    number = np.full(len(boundaries) + 1, -1, np.int32)
    number[:-1][good] = np.arange(good.sum())
    return Chunks(number[of_student], number[of_teacher], int(good.sum()))


def _places(side: Tokens, boundaries: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n]: the first boundary at or behind each token's end; len(boundaries) behind the last one."""
    return np.searchsorted(boundaries, side.ends, side="left").astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignText:
    """A text as a teacher with a tokenizer of its own reads it, aligned with the student's n tokens."""

    token_ids: NDArray[np.int32]
    """[m], the teacher's."""
    chunks: Chunks
    """At least one; the first begins behind the teacher's first token."""

    @property
    def start(self) -> int:
        """The first token of the teacher that is in a chunk, >= 1: where its answer begins."""
        return int(np.argmax(self.chunks.teacher >= 0))

    def logprobs(self, target_logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
        """[chunks]: sums of an answer's target_logprobs [m - start]; never above 0, which rounding may reach."""
        chunk_of = self.chunks.teacher[self.start :]
        inside = chunk_of >= 0
        sums = np.bincount(
            chunk_of[inside], weights=target_logprobs[inside].astype(np.float64), minlength=self.chunks.number
        )
        return np.minimum(sums, 0.0)
