"""Evaluation on held-out rows: divergence to the teacher and cross-entropy, by the objective that training minimises."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.batching.collate import MicroBatch, ScoredExample, collate
from stillhouse.student_trainer.train.batching.passes import Pass
from stillhouse.student_trainer.train.loss.alm import chunk_objective
from stillhouse.student_trainer.train.loss.objective import Positions, objective
from stillhouse.student_trainer.train.loss.sparse import SparseTargets
from stillhouse.student_trainer.train.loss.text_logprobs import text_logprobs_of
from stillhouse.student_trainer.train.student.lm_head import LmHead
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

DIVERGENCE = LossConfig(terms=(LossTermConfig(divergence="forward_kl"),))
"""Objective of rows with targets."""
TEXT_ALONE = LossConfig(terms=())
"""Objective of rows without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """Evaluates a student at temperature 1; nothing is drawn at random."""

    student: Student
    head: LmHead
    rows: Sequence[ScoredExample]
    """The held-out rows of this process, which may be a part of all."""
    num_rows: int
    """Held-out rows of all processes."""
    accelerator: Any
    cut: Callable[[Sequence[ScoredExample]], Sequence[Pass]]
    """Cuts rows into passes."""
    vocab_size: int
    """Effective vocabulary of teacher and student."""
    chunk_loss: LossConfig | None = None
    """Loss over chunks of text, where the teacher has another tokenizer."""
    total: Callable[[Mapping[str, float]], Mapping[str, float]] = field(default=dict)
    """Adds up the sums of all processes."""

    def evaluate(self) -> dict[str, float]:
        """Means over held-out tokens by metric name; empty without held-out rows.

        eval/kl: KL(teacher || student) on the teacher's top-k and the tail, a lower bound of the full one. eval/agreement:
        share of tokens whose most likely token is the same for both. These two only where there are targets. eval/alm: the
        terms of `chunk_loss`, as a mean over the chunks of text that teacher and student have in common.
        """
        if not self.num_rows:
            return {}
        sums: Counter[str] = Counter()
        with evaluation_mode(self.student.model):
            for each in self.cut(self.rows) if self.rows else ():
                rows = [self.rows[place] for place in each.rows]
                batch = collate(
                    rows, reduction="token_mean", device=self.accelerator.device, packing=each.packed
                )
                self._add_batch(sums, batch)
        whole = self.total({name: float(value) for name, value in sums.items()})
        names = ("cross_entropy", "kl", "agreement") if whole["answers"] else ("cross_entropy",)
        means = {f"eval/{name}": whole[name] / whole["tokens"] for name in names}
        if whole.get("chunks"):
            means["eval/alm"] = whole["alm"] / whole["chunks"]
        # Beyond this exponent no float holds the perplexity.
        means["eval/perplexity"] = math.exp(min(means["eval/cross_entropy"], 700.0))
        means["eval/tokens"] = whole["tokens"]
        return means

    def _add_batch(self, sums: Counter[str], batch: MicroBatch) -> None:
        sums["tokens"] += batch.num_targets
        sums["answers"] += batch.positions.targets is not None
        text = torch.zeros(1, batch.num_targets, device=self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            for rows, logits in self.head.logit_chunks(batch):
                sums.update(self._sum_positions(logits, batch.positions.rows(rows)))
                if batch.chunks is not None:
                    text[:, rows] = text_logprobs_of(logits, batch.positions.target_ids[:, rows])
        if batch.chunks is not None and self.chunk_loss is not None:
            loss = replace(self.chunk_loss, hard_weight=0)
            summed = chunk_objective(text, batch.positions.weights, batch.chunks, loss)
            sums.update({"alm": summed.loss_sum.item(), "chunks": batch.chunks.weights.sum().item()})

    def _sum_positions(self, logits: Tensor, here: Positions) -> dict[str, Any]:
        """Sums over some positions, whose logits are [1, n, V]."""
        loss = TEXT_ALONE if here.targets is None else DIVERGENCE
        parts = objective(
            logits, here.target_ids, here.targets, here.weights, loss, vocab_size=self.vocab_size
        ).parts
        sums = {"cross_entropy": parts["cross_entropy"].item()}
        if isinstance(here.targets, SparseTargets):
            agrees = logits.argmax(-1) == here.targets.token_ids[..., 0]
            sums |= {"kl": parts["forward_kl"].item(), "agreement": float(agrees.sum().item())}
        return sums
