"""Both models' likeliest tokens at the targets of a few held-out rows, read from logits that an evaluation computes anyway.

An example never fails a run: what goes wrong here is logged once, and the evaluation goes on without examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.evaluation.example_plan import ExamplePlan, ShownRow
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import SparseTargets, teacher_buckets, widened

log = structlog.get_logger()

TOP_K = 10
"""Likeliest tokens of either model that are written."""
_BLOCK = 64
"""Positions read at a time, which bounds the copy of their logits."""
_DIGITS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownExamples:
    """The examples of one evaluation, of the rows of all processes."""

    plan: ExamplePlan
    values: Mapping[int, Mapping[str, Any]]
    """Values of the rows that were read, by their places among all held-out rows, as JSON has them."""


@dataclass(kw_only=True, slots=True)
class TokenExamples:
    """Collects the examples of one evaluation, of the rows that this process has."""

    plan: ExamplePlan
    vocab_size: int
    """Effective vocabulary."""
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows by their places among all held-out rows, as JSON values."""
    broken: bool = False

    def of_batch(self, places: Sequence[int], scored: Sequence[ScoredExample]) -> BatchExamples:
        """Returns the collector of a batch of rows, given their places among all held-out rows."""
        wanted: list[tuple[int, int]] = []
        first = 0
        for place, each in zip(places, scored, strict=True):
            row = self.plan.rows.get(place)
            if row is not None and not self.broken:
                wanted += [(place, first + number) for number in range(row.num_targets)]
                self.rows[place] = {
                    "at": (row.targets - row.begin).tolist(),
                    "teacher": _text_logprobs(each, row),
                    "values": [],
                }
            first += each.example.num_targets
        return BatchExamples(examples=self, wanted=wanted)

    def told(self) -> dict[str, Any]:
        """Returns the complete rows by place, as text: a value to exchange."""
        whole = {} if self.broken else self.rows
        return {str(place): row for place, row in whole.items() if len(row["values"]) == len(row["at"])}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchExamples:
    """Reads the wanted targets of one batch."""

    examples: TokenExamples
    wanted: Sequence[tuple[int, int]]
    """Place of the row, and the target's place in the batch, ascending."""

    def take(
        self,
        chunk: slice,
        logits: Float[Tensor, "1 N V"],
        here: Positions,
        scores: Mapping[str, Tensor],
    ) -> None:
        """Reads the targets in `chunk` of the batch, whose logits and scores are given. Raises nothing."""
        inside = [(place, at - chunk.start) for place, at in self.wanted if chunk.start <= at < chunk.stop]
        if not inside or self.examples.broken:
            return
        try:
            for first in range(0, len(inside), _BLOCK):
                block = inside[first : first + _BLOCK]
                at = torch.tensor([each for _, each in block], device=logits.device)
                found = _read(logits[0, at], here, scores, at, self.examples.vocab_size)
                for (place, _), values in zip(block, found, strict=True):
                    self.examples.rows[place]["values"].append(values)
        except Exception as error:
            self.examples.broken = True
            log.warning(
                "examples of held-out rows cannot be read; the evaluation has none", why=str(error)[:500]
            )


def _text_logprobs(scored: ScoredExample, row: ShownRow) -> list[float | None] | None:
    """Returns the teacher's log-probabilities of the shown targets; None without a teacher that reads the same tokens."""
    answer = scored.answer
    if answer is None or scored.example.aligned is not None:
        return None
    return _finite(answer.target_logprobs[row.targets - answer.start].tolist())


def _read(
    logits: Float[Tensor, "N V"],
    here: Positions,
    scores: Mapping[str, Tensor],
    at: Int64[Tensor, N],
    vocab_size: int,
) -> list[dict[str, Any]]:
    """Returns the values of positions `at`, of which `logits` are those of the student."""
    wide = widened(logits)
    total = wide.logsumexp(-1, keepdim=True)
    size = min(vocab_size, wide.shape[-1])
    student_ids = wide[:, :size].topk(min(TOP_K, size), -1).indices
    student = _Side.of(student_ids, wide.gather(-1, student_ids) - total)
    student_tail = wide.scatter(-1, student_ids, -torch.inf).logsumexp(-1) - total[:, 0]
    values = {
        "kl": _numbers(scores.get("kl"), at),
        "student_logprob": _numbers(-scores["cross_entropy"], at),
        "student_tail": _listed(student_tail),
    }
    targets = here.targets
    if not isinstance(targets, SparseTargets):
        rows = [
            [[token, None, logprob] for token, logprob in zip(*pair, strict=True)]
            for pair in zip(student.ids, student.logprobs, strict=True)
        ]
        return [
            {**{name: column[row] for name, column in values.items() if column}, "top": top}
            for row, top in enumerate(rows)
        ]
    known = targets.rows(at)
    buckets = teacher_buckets(known, num_logits=wide.shape[-1], vocab_size=vocab_size)
    assert buckets.token_ids is not None
    assert buckets.kept is not None
    ids, kept = buckets.token_ids[0], buckets.kept[0]
    logprobs = buckets.logprobs[0, :, :-1].masked_fill(~kept, -torch.inf)
    best = logprobs.topk(min(TOP_K, logprobs.shape[-1]), -1)
    teacher_ids = ids.gather(-1, best.indices)
    tail = torch.cat([logprobs.scatter(-1, best.indices, -torch.inf), buckets.logprobs[0, :, -1:]], -1)
    values["teacher_tail"] = _listed(tail.logsumexp(-1))
    counts = kept.sum(-1).tolist()
    teacher = _Side.of(teacher_ids, best.values)
    at_teacher = _listed2(wide.gather(-1, teacher_ids.clamp(0, wide.shape[-1] - 1)) - total)
    at_student = _listed2(_lookup(student_ids, ids, kept, logprobs))
    return [
        {
            **{name: column[row] for name, column in values.items() if column},
            "known": counts[row],
            "top": _union(teacher, student, at_teacher[row], at_student[row], row),
        }
        for row in range(len(at))
    ]


@dataclass(frozen=True, slots=True)
class _Side:
    """Likeliest tokens of one model, [N][K]."""

    ids: list[list[int]]
    logprobs: list[list[float | None]]

    @classmethod
    def of(cls, ids: Tensor, logprobs: Tensor) -> _Side:
        return cls(ids.tolist(), _listed2(logprobs))


def _union(
    teacher: _Side,
    student: _Side,
    at_teacher: Sequence[float | None],
    at_student: Sequence[float | None],
    row: int,
) -> list[list[Any]]:
    """Returns [id, teacher's logprob, student's logprob] of each model's likeliest tokens, those of the teacher first."""
    found = [
        [token, logprob, own]
        for token, logprob, own in zip(teacher.ids[row], teacher.logprobs[row], at_teacher, strict=True)
        if logprob is not None
    ]
    named = {each[0] for each in found}
    return found + [
        [token, other, logprob]
        for token, other, logprob in zip(student.ids[row], at_student, student.logprobs[row], strict=True)
        if token not in named
    ]


def _lookup(tokens: Tensor, ids: Tensor, kept: Tensor, logprobs: Tensor) -> Tensor:
    """Returns the teacher's logprobs [N, M] of `tokens` [N, M]; NaN for those that it did not send."""
    same = (tokens[:, :, None] == ids[:, None, :]) & kept[:, None, :]
    value = logprobs[:, None, :].expand(same.shape).masked_fill(~same, -torch.inf).amax(-1)
    return value.masked_fill(~same.any(-1), torch.nan)


def _numbers(column: Tensor | None, at: Tensor) -> list[float | None]:
    return [] if column is None else _listed(column[at])


def _listed(column: Tensor) -> list[float | None]:
    return _finite(column.double().tolist())


def _listed2(columns: Tensor) -> list[list[float | None]]:
    return [_finite(row) for row in columns.double().tolist()]


def _finite(values: Sequence[float]) -> list[float | None]:
    """Returns numbers as JSON has them: None for what is not finite."""
    return [round(each, _DIGITS) if math.isfinite(each) else None for each in values]
