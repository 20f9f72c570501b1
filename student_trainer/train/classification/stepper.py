"""Steps of a classifier: those of a language model whose positions are rows and whose vocabulary is the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.batching.collate import Factor, MicroBatch, ScoredExample
from stillhouse.student_trainer.train.classification.batch import collate_classes
from stillhouse.student_trainer.train.classification.classes import Classes
from stillhouse.student_trainer.train.classification.rows import LabelledExample
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum
from stillhouse.student_trainer.train.step import Stepper

_OF_TEXT = frozenset({"teacher_mass", "tail_clamped"})
"""Parts of the objective that say nothing of classes, of which none is left out."""


class ClassStepper(Stepper):
    """Takes optimizer steps of a classifier."""

    def __init__(self, *arguments: Any, classes: Classes, is_labelled: bool, **options: Any) -> None:
        """`is_labelled`: rows have labels, and their cross-entropy is a metric even without a weight."""
        super().__init__(*arguments, vocab_size=len(classes.names), **options)
        self._classes = classes
        self._is_labelled = is_labelled

    def _collate(
        self,
        group: Sequence[ScoredExample],
        factors: Sequence[Factor],  # noqa: ARG002 (of tokens)
        chunk_scale: float,  # noqa: ARG002
        *,
        packed: bool,
    ) -> MicroBatch:
        assert not packed, "an encoder reads every row alone"
        assert isinstance(group[0].example, LabelledExample), "a classifier's rows"
        return collate_classes(
            group,
            self._classes,
            device=self.device,
            pad_id=self._student.tokenizer.pad_token_id or 0,
            temperature=self._losses[group[0].context].temperature,
        )

    def _objective(self, batch: MicroBatch, loss: LossConfig, *, upstream: float = 1.0) -> ObjectiveSum:
        summed = super()._objective(batch, loss, upstream=upstream)
        unknown = _OF_TEXT if self._is_labelled else {*_OF_TEXT, "cross_entropy"}
        parts = {name: value for name, value in summed.parts.items() if name not in unknown}
        return replace(summed, parts=parts)
