"""Which questions a run asks its teachers about its dataset: the same ones whether a teacher answers, a cache does, or a cache is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.student_trainer.config.checks import TEACHER_METRICS
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.answers import RequestOf, evaluation_request, training_request


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked about some examples."""

    request: RequestOf
    """Of each teacher."""
    examples: Sequence[Example]
    field: str
    """Where its top_k stands in the run file."""
    by_row: bool
    """Whether a row names its teacher; else every teacher is asked."""
    held_out: bool
    """Whether it is about text that nobody learns from."""

    def of(self, teacher: str) -> list[Example]:
        """The examples that a teacher is asked about."""
        return [each for each in self.examples if not self.by_row or each.teacher == teacher]


def training_questions(config: RunConfig, corpus: Corpus) -> list[Question]:
    """About the dataset's own completions, once for each loss that learns from them."""
    fields = {
        config.loss_of(context): f"contexts[{number}].loss.top_k" if context.loss else "loss.top_k"
        for number, context in enumerate(config.contexts)
        if context.dataset is not None and config.loss_of(context).asks_teacher
    }
    return [
        Question(
            request=training_request(loss, config.data.seed),
            examples=corpus.train,
            field=field,
            by_row=bool(config.data.teacher_field),
            held_out=False,
        )
        for loss, field in fields.items()
    ]


def evaluation_questions(config: RunConfig, corpus: Corpus) -> list[Question]:
    """About the held-out rows, if they are compared with a teacher."""
    if not (corpus.eval and TEACHER_METRICS & set(config.evaluation.metrics)):
        return []
    return [
        Question(
            request=evaluation_request(config.evaluation.top_k),
            examples=corpus.eval,
            field="evaluation.top_k",
            by_row=bool(config.data.teacher_field),
            held_out=True,
        )
    ]
