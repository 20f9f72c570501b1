"""Evaluation of a classifier on held-out rows: against their labels, and against the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stillhouse.protos.evaluation.row_sums import RowSums
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.batching.passes import Pass
from stillhouse.student_trainer.train.classification import metrics
from stillhouse.student_trainer.train.classification.batch import collate_classes
from stillhouse.student_trainer.train.classification.classes import Classes
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows
from stillhouse.student_trainer.train.evaluation.evaluator import Evaluation
from stillhouse.student_trainer.train.evaluation.set_scores import TEACHER, Columns, gather_columns
from stillhouse.student_trainer.train.loss.sparse import SparseTargets
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

_MEANS = ("cross_entropy", "kl", "agreement")
_OF_TEACHER = {"accuracy": "teacher_accuracy", "f1": "teacher_f1", "ece": "teacher_ece"}
"""Metrics of the teacher by those of the student."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassEvaluator:
    """Evaluates a classifier at temperature 1; nothing is drawn at random."""

    student: Student
    classes: Classes
    rows: Sequence[ScoredExample]
    """The held-out rows of this process, which may be a part of all."""
    places: Sequence[int]
    """Their places among those of all processes."""
    num_rows: int
    """Held-out rows of all processes, those of named sets included."""
    sets: Sequence[EvaluationRows]
    """The held-out rows and every named set, by their places."""
    is_labelled: bool
    accelerator: Any
    cut: Callable[[Sequence[ScoredExample]], Sequence[Pass]]
    """Cuts rows into passes."""
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns the values of all processes; they are JSON."""

    @property
    def generation(self) -> Mapping[str, Any]:
        """Empty: a classifier writes no text."""
        return {}

    def evaluate(self) -> Evaluation:
        """Metrics over held-out rows by name, those of a named set as eval/SET/NAME; empty without rows.

        With labels eval/accuracy, eval/f1, eval/ece and eval/cross_entropy; with targets eval/kl, KL(teacher || student), and
        eval/agreement, the share of rows with the same likeliest class; with both the teacher's own, as eval/teacher_accuracy.
        """
        if not self.num_rows:
            return Evaluation(metrics={})
        own: Columns = {}
        with evaluation_mode(self.student.model), torch.no_grad():
            for part in self.cut(self.rows) if self.rows else ():
                for name, values in self._score_batch([self.rows[place] for place in part.rows]).items():
                    own.setdefault(name, np.zeros((len(self.rows), 1)))[list(part.rows), 0] = values
        columns, _ = gather_columns(own, self.places, num_rows=self.num_rows, exchange=self.exchange)
        found: dict[str, float] = {}
        student: dict[str, dict[str, RowSums]] = {}
        teacher: dict[str, dict[str, RowSums]] = {}
        for each in self.sets:
            if each.end == each.begin:
                continue
            here = {name: column[each.begin : each.end, 0] for name, column in columns.items()}
            scores = student[each.settings.name] = self._scores(here)
            scores |= {name: RowSums.mean(here[name]) for name in _MEANS if name in here}
            theirs = teacher[each.settings.name] = self._scores(here, TEACHER)
            head = f"eval/{each.settings.name}/" if each.settings.name else "eval/"
            named = {**metrics.values(scores), **self._f1(here)}
            of_teacher = {**metrics.values(theirs), **self._f1(here, TEACHER)}
            named |= {_OF_TEACHER[name]: value for name, value in of_teacher.items()}
            named["rows"] = float(each.end - each.begin)
            found |= {head + name: value for name, value in named.items()}
        return Evaluation(metrics=found, student=student, teacher=teacher)

    def _scores(self, columns: Columns, of: str = "") -> dict[str, RowSums]:
        """Scores against the labels of the student, or `of` TEACHER; empty without labels or a teacher."""
        if "label" not in columns or f"{of}predicted" not in columns:
            return {}
        return metrics.class_scores(*_predictions(columns, of), len(self.classes.names))

    def _f1(self, columns: Columns, of: str = "") -> dict[str, float]:
        """F1 of as many rows as no report holds, too."""
        if "label" not in columns or f"{of}predicted" not in columns:
            return {}
        predicted, _, labels = _predictions(columns, of)
        return {"f1": metrics.f1(predicted, labels, len(self.classes.names))}

    def _score_batch(self, rows: Sequence[ScoredExample]) -> Columns:
        """Scores of each row of a batch, [B], by name, in float64."""
        batch = collate_classes(
            rows,
            self.classes,
            device=self.accelerator.device,
            pad_id=self.student.tokenizer.pad_token_id or 0,
        )
        with self.accelerator.autocast():
            logits = self.student.logits(batch)
        log_q = logits[0].double().log_softmax(-1)
        found = _likeliest(log_q)
        labels = batch.positions.target_ids[0]
        if self.is_labelled:
            found["label"] = labels
            found["cross_entropy"] = -log_q.gather(-1, labels[:, None])[:, 0]
        targets = batch.positions.targets
        if isinstance(targets, SparseTargets):
            log_p = targets.logprobs[0].double().log_softmax(-1)  # float32 on the wire
            # A class without probability adds nothing, however unlikely the student finds it.
            found["kl"] = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
            found["agreement"] = log_p.argmax(-1) == log_q.argmax(-1)
            found |= {TEACHER + name: value for name, value in _likeliest(log_p).items()}
        return {name: value.double().cpu().numpy() for name, value in found.items()}


def _likeliest(logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The predicted class and its probability, of rows [B, C]."""
    largest = logprobs.max(-1)
    return {"predicted": largest.indices, "confidence": largest.values.exp()}


def _predictions(columns: Columns, of: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted classes, their probabilities, and labels."""
    predicted, labels = (columns[name].astype(np.int64) for name in (f"{of}predicted", "label"))
    return predicted, columns[f"{of}confidence"], labels
