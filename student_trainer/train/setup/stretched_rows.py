"""Rows of a trial: a row with all that is known of it, repeated to the length of the run's longest one."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.alignment import AlignedText, Chunks


def stretched(scored: ScoredExample, length: int) -> ScoredExample:
    """The row with its tokens, its targets and its chunks repeated to `length` tokens, or cut there."""
    example, aligned = scored.example, scored.example.aligned
    start = min(example.start, length - 1)
    mask = np.concatenate([example.mask[:start], np.resize(example.mask[example.start :], length - start)])
    row = replace(
        example,
        token_ids=np.resize(example.token_ids, length),
        mask=mask.astype(np.bool_),
        num_prompt=None,
    )
    answer = scored.answer
    if aligned is not None:
        times = math.ceil((length - start) / (len(example.token_ids) - example.start))
        row = replace(row, aligned=_repeated_text(aligned, example.start, start, length, times))
        if answer is not None:
            answer = _repeated_rows(answer, answer.start, times * (len(aligned.token_ids) - aligned.start))
    elif answer is not None:
        first = min(answer.start, start)
        answer = _repeated_rows(answer, first, length - first)
    return replace(
        scored,
        example=row,
        answer=answer,
        behaviour_logprobs=_repeated(scored.behaviour_logprobs, length - start),
        baseline=_repeated(scored.baseline, length - start),
        draw_logprobs=_repeated(scored.draw_logprobs, length - start),
    )


def _repeated_text(aligned: AlignedText, begin: int, start: int, length: int, times: int) -> AlignedText:
    """The teacher's text `times` over, aligned with the student's tokens from `begin` on, which follow at `start`."""
    chunks = aligned.chunks
    head = chunks.student[:start]
    student = np.concatenate([head, _renumbered(chunks.student[begin:], chunks.number, times)])[:length]
    teacher = _renumbered(chunks.teacher[aligned.start :], chunks.number, times)
    ids = np.concatenate(
        [aligned.token_ids[: aligned.start], np.tile(aligned.token_ids[aligned.start :], times)]
    )
    outside = np.full(aligned.start, -1, np.int32)
    return AlignedText(
        token_ids=ids.astype(np.int32),
        chunks=Chunks(
            student=student.astype(np.int32),
            teacher=np.concatenate([outside, teacher]).astype(np.int32),
            number=times * chunks.number,
        ),
    )


def _renumbered(chunk_of: NDArray[np.int32], number: int, times: int) -> NDArray[np.int64]:
    """Chunk indices repeated, with numbers of their own in every repetition."""
    offsets = np.repeat(np.arange(times) * number, len(chunk_of))
    tiled = np.tile(chunk_of, times).astype(np.int64)
    return np.where(tiled < 0, -1, tiled + offsets)


def _repeated_rows(answer: Distributions, start: int, number: int) -> Distributions:
    parts: dict[str, Any] = {each.name: getattr(answer, each.name) for each in fields(Distributions)}
    arrays: dict[str, Any] = {
        name: _repeated(part, number) for name, part in parts.items() if name != "start"
    }
    return Distributions(start=start, **arrays)


def _repeated(array: np.ndarray | None, number: int) -> np.ndarray | None:
    return None if array is None else array[np.arange(number) % len(array)]
