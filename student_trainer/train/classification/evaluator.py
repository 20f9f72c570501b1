"""Evaluation of a classifier on held-out rows: against their labels, and against the teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.batching.passes import Pass
from stillhouse.student_trainer.train.classification import metrics
from stillhouse.student_trainer.train.classification.batch import collate_classes
from stillhouse.student_trainer.train.classification.classes import Classes
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows
from stillhouse.student_trainer.train.evaluation.evaluator import Evaluation
from stillhouse.student_trainer.train.loss.objective import objective
from stillhouse.student_trainer.train.loss.sparse import SparseTargets
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

_DIVERGENCE = LossConfig(terms=(LossTermConfig(divergence="forward_kl"),))
_LABELS_ALONE = LossConfig(terms=(), hard_weight=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassEvaluator:
    """Evaluates a classifier at temperature 1; nothing is drawn at random."""

    student: Student
    classes: Classes
    rows: Sequence[ScoredExample]
    """The held-out rows of this process, which may be a part of all."""
    places: Sequence[int]
    """Their places among those of all processes."""
    sets: Sequence[EvaluationRows]
    """The held-out rows and every named set, by their places."""
    is_labelled: bool
    accelerator: Any
    cut: Callable[[Sequence[ScoredExample]], Sequence[Pass]]
    """Cuts rows into passes."""
    total: Callable[[Mapping[str, float]], Mapping[str, float]] = field(default=dict)
    """Adds up the sums of all processes."""

    @property
    def generation(self) -> Mapping[str, Any]:
        """Empty: a classifier writes no text."""
        return {}

    def evaluate(self) -> Evaluation:
        """Metrics over held-out rows by name, those of a named set as eval/SET/NAME; empty without rows.

        With labels eval/accuracy, eval/f1, eval/ece and eval/cross_entropy; with targets eval/kl, KL(teacher || student), and
        eval/agreement, the share of rows with the same likeliest class; with both the teacher's own, as eval/teacher_accuracy.
        """
        found: dict[str, float] = {}
        for each in self.sets:
            if each.end > each.begin:
                own = [
                    row
                    for row, place in zip(self.rows, self.places, strict=True)
                    if each.begin <= place < each.end
                ]
                head = f"eval/{each.settings.name}/" if each.settings.name else "eval/"
                found |= {head + name: value for name, value in self._scores(own).items()}
        return Evaluation(metrics=found)

    def _scores(self, rows: Sequence[ScoredExample]) -> dict[str, float]:
        """Metrics over a set, of which this process has `rows`."""
        sums: Counter[str] = Counter()
        with evaluation_mode(self.student.model), torch.no_grad():
            for each in self.cut(rows) if rows else ():
                self._add([rows[place] for place in each.rows], sums)
        whole = self.total({name: float(value) for name, value in sums.items()})
        found = dict(metrics.summarise(whole))
        if self.is_labelled:
            found["cross_entropy"] = whole["cross_entropy"] / whole["rows"]
        if whole.get("answers"):
            found |= {name: whole[name] / whole["rows"] for name in ("kl", "agreement")}
            teacher = metrics.summarise(whole, "teacher/")
            if teacher:
                found["teacher_accuracy"] = teacher["accuracy"]
                found["teacher_f1"] = teacher["f1"]
                found["teacher_ece"] = teacher["ece"]
        return {**found, "rows": whole["rows"]}

    def _add(self, rows: Sequence[ScoredExample], sums: Counter[str]) -> None:
        batch = collate_classes(
            rows,
            self.classes,
            device=self.accelerator.device,
            pad_id=self.student.tokenizer.pad_token_id or 0,
        )
        with self.accelerator.autocast():
            logits = self.student.logits(batch)
        here = batch.positions
        loss = _LABELS_ALONE if here.targets is None else _DIVERGENCE
        parts = objective(
            logits, here.target_ids, here.targets, here.weights, loss, vocab_size=len(self.classes.names)
        ).parts
        sums["rows"] += len(rows)
        labels = here.target_ids[0].cpu().numpy()
        if self.is_labelled:
            sums["cross_entropy"] += parts["cross_entropy"].item()  # type: ignore[assignment]
            sums.update(metrics.count(logits[0].double().softmax(-1).cpu().numpy(), labels))
        if isinstance(here.targets, SparseTargets):
            teacher = here.targets.logprobs[0].double()
            sums["answers"] += len(rows)
            sums["kl"] += parts["forward_kl"].item()  # type: ignore[assignment]
            sums["agreement"] += int((logits[0].argmax(-1) == teacher.argmax(-1)).sum())
            if self.is_labelled:
                sums.update(metrics.count(teacher.exp().cpu().numpy(), labels, "teacher/"))
