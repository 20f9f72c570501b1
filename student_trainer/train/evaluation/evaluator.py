"""Evaluation on held-out rows: scores of each row over its tokens, and of text that the student writes for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.protos.evaluation.calibration import bin_sums
from stillhouse.protos.evaluation.names import TEXT_METRICS
from stillhouse.protos.evaluation.row_sums import RowSums, score_texts
from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.batching.collate import MicroBatch, ScoredExample, collate
from stillhouse.student_trainer.train.batching.passes import Pass
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows
from stillhouse.student_trainer.train.evaluation.example_plan import ExamplePlan
from stillhouse.student_trainer.train.evaluation.set_scores import (
    TEACHER,
    Columns,
    gather_columns,
    set_scores,
    teacher_columns,
)
from stillhouse.student_trainer.train.evaluation.text_writer import TextWriter, reference_text
from stillhouse.student_trainer.train.evaluation.token_examples import (
    BatchExamples,
    ShownExamples,
    TokenExamples,
)
from stillhouse.student_trainer.train.evaluation.token_scores import token_scores
from stillhouse.student_trainer.train.loss.alm import chunk_objective
from stillhouse.student_trainer.train.loss.text_logprobs import text_logprobs_of
from stillhouse.student_trainer.train.student.lm_head import LmHead
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

SetScores = Mapping[str, Mapping[str, RowSums]]
"""Name of a set to name of a value to the scores of its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenText:
    """A text of the student beside its reference."""

    text: str
    reference: str
    row: str
    """Place of the row, for errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Outcome of one evaluation, the same in every process."""

    metrics: Mapping[str, float]
    """By name, such as eval/kl or eval/SET/bleu; empty without rows."""
    student: SetScores = field(default_factory=dict)
    teacher: SetScores = field(default_factory=dict)
    """The teacher's own scores against the text, where it gave distributions."""
    texts: Mapping[str, Sequence[WrittenText]] = field(default_factory=dict)
    """By name of the set."""
    examples: ShownExamples | None = None
    """Tokens of a few rows; None if none are wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """Evaluates a student at temperature 1, its written text apart; nothing changes its weights or random numbers."""

    student: Student
    head: LmHead
    rows: Sequence[ScoredExample]
    """The held-out rows of this process, which may be a part of all."""
    places: Sequence[int]
    """Their places among all."""
    num_rows: int
    """Held-out rows of all processes, those of named sets included."""
    sets: Sequence[EvaluationRows]
    accelerator: Any
    cut: Callable[[Sequence[ScoredExample]], Sequence[Pass]]
    """Cuts rows into passes."""
    vocab_size: int
    """Effective vocabulary of teacher and student."""
    writer: TextWriter
    plan: ExamplePlan = field(default_factory=ExamplePlan)
    """The rows whose tokens are read, the same in every process."""
    chunk_loss: LossConfig | None = None
    """Loss over chunks of text, where the teacher has another tokenizer."""
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns the values of all processes; they are JSON."""
    poll: Callable[[], object] = lambda: None
    """Called before each pass; may raise Stopped."""

    @property
    def generation(self) -> Mapping[str, Any]:
        """Sampling of the text that the student writes."""
        return self.writer.settings

    def evaluate(self) -> Evaluation:
        """Scores all rows. eval/kl and others with a teacher only where there are targets; token_scores.py defines them.

        eval/alm: the terms of `chunk_loss`, as a mean over the chunks of text that teacher and student have in common.
        """
        if not self.num_rows:
            return Evaluation(metrics={})
        sums: Counter[str] = Counter()
        own = teacher_columns(self.rows)
        examples = TokenExamples(plan=self.plan, vocab_size=self.vocab_size)
        with evaluation_mode(self.student.model):
            for part in self.cut(self.rows) if self.rows else ():
                self.poll()
                batch = collate(
                    [self.rows[place] for place in part.rows],
                    reduction="token_mean",
                    device=self.accelerator.device,
                    packing=part.packed,
                )
                read = examples.of_batch(
                    [self.places[row] for row in part.rows], [self.rows[row] for row in part.rows]
                )
                for name, values in self._score_batch(sums, batch, part.rows, read).items():
                    whole = own.setdefault(name, np.zeros((len(self.rows), values.shape[1])))
                    whole[list(part.rows)] = values
        columns, chunks = gather_columns(
            own, self.places, num_rows=self.num_rows, exchange=self.exchange, sums=sums
        )
        student = {each.settings.name: set_scores(each, columns) for each in self.sets}
        teacher = {each.settings.name: set_scores(each, columns, of=TEACHER) for each in self.sets}
        texts = self._write()
        for each in self.sets:
            student[each.settings.name] |= _text_scores(each, texts.get(each.settings.name, ()))
        metrics = {name: value for each in self.sets for name, value in metrics_of(each, student).items()}
        if chunks.get("chunks"):
            metrics["eval/alm"] = chunks["alm"] / chunks["chunks"]
        metrics["eval/tokens"] = float(columns["tokens"].sum())
        return Evaluation(
            metrics=metrics,
            student=student,
            teacher=teacher,
            texts=texts,
            examples=self._gather_examples(examples),
        )

    def _score_batch(
        self, sums: Counter[str], batch: MicroBatch, rows: Sequence[int], examples: BatchExamples
    ) -> Columns:
        """Returns sums over the tokens of each row of a batch, [rows, S], by name."""
        numbers = [self.rows[place].example.num_targets for place in rows]
        row_of = np.repeat(np.arange(len(rows)), numbers)
        found: dict[str, list[NDArray[np.float64]]] = {}
        text = torch.zeros(1, batch.num_targets, device=self.accelerator.device)
        named = {
            metric for each in self.sets for metric in each.settings.metrics if not each.settings.has_choices
        }
        with torch.no_grad(), self.accelerator.autocast():
            for chunk, logits in self.head.logit_chunks(batch):
                here = batch.positions.rows(chunk)
                of_chunk = token_scores(logits, here, vocab_size=self.vocab_size, named=named)
                for name, values in of_chunk.items():
                    found.setdefault(name, []).append(_array(values))
                examples.take(chunk, logits, here, of_chunk)
                if batch.chunks is not None:
                    text[:, chunk] = text_logprobs_of(logits, here.target_ids)
        if batch.chunks is not None and self.chunk_loss is not None:
            loss = replace(self.chunk_loss, hard_weight=0)
            summed = chunk_objective(text, batch.positions.weights, batch.chunks, loss)
            sums.update({"alm": summed.loss_sum.item(), "chunks": batch.chunks.weights.sum().item()})
        scores = {name: np.concatenate(parts) for name, parts in found.items()}
        columns: Columns = {"tokens": np.asarray(numbers, np.float64)[:, None]}
        if "confidence" in scores:
            confidence, correct = scores.pop("confidence"), scores.pop("correct")
            columns["ece"] = np.stack(
                [bin_sums(confidence[row_of == row], correct[row_of == row] > 0) for row in range(len(rows))]
            )
        for name, score in scores.items():
            summed_rows = np.bincount(row_of, weights=score, minlength=len(rows))
            columns[name] = summed_rows.astype(np.float64)[:, None]
        return columns

    def _gather_examples(self, own: TokenExamples) -> ShownExamples | None:
        if not self.plan.rows:
            return None
        told = [each for part in self.exchange(own.told()) for each in part.items()]
        return ShownExamples(plan=self.plan, values={int(place): row for place, row in told})

    def _write(self) -> Mapping[str, Sequence[WrittenText]]:
        """Writes a text for every row of the sets that want it."""
        wanted = [each for each in self.sets if each.settings.writes_text]
        if not wanted:
            return {}
        inside = [
            (place, row.example)
            for place, row in zip(self.places, self.rows, strict=True)
            if any(each.begin <= place < each.end for each in wanted)
        ]
        self.poll()
        places, examples = [place for place, _ in inside], [example for _, example in inside]
        texts = self.writer.write(examples, places) if examples else []
        references = [reference_text(self.student.tokenizer, example) for example in examples]
        rows = [example.place for example in examples]
        told: dict[int, WrittenText] = {
            place: WrittenText(text=text, reference=reference, row=row)
            for part in self.exchange([places, texts, references, rows])
            for place, text, reference, row in zip(*part, strict=True)
        }
        return {each.settings.name: [told[place] for place in range(each.begin, each.end)] for each in wanted}


def _array(score: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = score.double().cpu().numpy()
    return array


def _text_scores(rows: EvaluationRows, texts: Sequence[WrittenText]) -> dict[str, RowSums]:
    """Returns the scores of written text by name."""
    scores: dict[str, RowSums] = {}
    written, references = [each.text for each in texts], [each.reference for each in texts]
    for metric in rows.settings.metrics:
        if texts and metric in TEXT_METRICS:
            scores |= score_texts(
                metric,
                written,
                references,
                match=rows.settings.match,
                places=[each.row for each in texts],
            )
    return scores


def metrics_of(rows: EvaluationRows, scores: SetScores) -> dict[str, float]:
    """Returns metrics of a set by their names in the journal: of the held-out rows all, of a named set those that it names."""
    settings = rows.settings
    head = f"eval/{settings.name}/" if settings.name else "eval/"
    asked = {value.rpartition("/")[2] for value in settings.values}
    return {
        head + name: each.value
        for name, each in scores[settings.name].items()
        # Fields of answers have the names that the data gives them: the report has these.
        if "/" not in name and (not settings.name or name in asked)
    }
