"""The task "evaluate": scores a student, the baseline before it and the teacher, on the same rows, and writes the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog

from stillhouse.protos.evaluation.names import TEXT_METRICS
from stillhouse.protos.evaluation.row_sums import RowSums, score_texts
from stillhouse.student_trainer.config.schema import RolloutConfig, RunConfig, StudentConfig
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows
from stillhouse.student_trainer.train.evaluation.evaluator import Evaluation, Evaluator, metrics_of
from stillhouse.student_trainer.train.evaluation.example_files import ExampleFiles, Subject
from stillhouse.student_trainer.train.evaluation.example_plan import choose_rows
from stillhouse.student_trainer.train.evaluation.run_report import RunReport
from stillhouse.student_trainer.train.evaluation.set_scores import TEACHER, set_scores, teacher_columns
from stillhouse.student_trainer.train.evaluation.text_writer import (
    MAX_NEW_TOKENS,
    TextWriter,
    reference_text,
    text_seed,
)
from stillhouse.student_trainer.train.process.memory import memory_of
from stillhouse.student_trainer.train.process.waiting import Stopped
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import Outcome, RunScope, open_scope
from stillhouse.student_trainer.train.setup.student_side import check_length
from stillhouse.student_trainer.train.setup.teacher_side import TeacherSide, connect_teachers
from stillhouse.student_trainer.train.student import device
from stillhouse.student_trainer.train.student.lm_head import LmHead
from stillhouse.student_trainer.train.student.packing_check import cutter_of
from stillhouse.student_trainer.train.student.student import Student
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.query import submit_ahead
from stillhouse.student_trainer.train.teacher.streams.generated import TextStream

log = structlog.get_logger()

WINDOW_PROMPTS = 64
"""Prompts in flight to a teacher at most."""


def evaluate(config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool]) -> Outcome:
    """Evaluates the run's student, or until the run is asked to stop: a resumed one begins anew, but keeps teachers' answers.

    Raises StillhouseError for all that a user can cause.
    """
    with open_scope(config, attempt, stop_requested) as scope:
        try:
            return _Evaluation.set_up(scope).run()
        except Stopped:
            return Outcome(kind="stopped", step=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evaluation:
    """An evaluation, ready to score."""

    scope: RunScope
    inputs: Inputs
    teacher_side: TeacherSide
    rows: Sequence[ScoredExample]

    @classmethod
    def set_up(cls, scope: RunScope) -> _Evaluation:
        """Reads the rows and reaches the teachers, if metrics need one."""
        inputs = Inputs.load(scope)
        teacher_side = TeacherSide.connect(scope, inputs)
        scope = replace(scope, config=teacher_side.config)
        rows = teacher_side.held_out.score(scope, teacher_side.teachers)
        return cls(scope=scope, inputs=inputs, teacher_side=teacher_side, rows=rows)

    def run(self) -> Outcome:
        """Scores each model in turn; each is a step of the run, and the metrics are those of the last, the student."""
        config, attempt = self.scope.config, self.scope.attempt
        if config.evaluation.teacher_alone:
            return self._run_teacher_alone()
        models: list[tuple[Subject, StudentConfig]] = [("after", config.student)]
        if config.evaluation.baseline:
            models.insert(0, ("before", config.evaluation.baseline))
        attempt.report("started", total_steps=len(models), step=0)
        report = None
        examples = ExampleFiles(attempt, self.inputs.tokenizer, from_cache=config.is_offline)
        for step, (subject, student) in enumerate(models, start=1):
            with memory_of(lambda: f"The evaluation of {student.model}"):  # noqa: B023 - called within the iteration
                evaluator = self._evaluator(student)
                outcome = evaluator.evaluate()
            if subject == "after":
                outcome = replace(outcome, teacher=self._teacher_scores(outcome))
            report = RunReport(attempt, evaluator.writer.settings)
            report.keep(subject, step, outcome)
            examples.write(step, subject, outcome.examples)
            if subject == "after":
                self.scope.reporter.metrics(step, outcome.metrics)
            log.info("evaluated", subject=subject, model=student.model, **outcome.metrics)
            del evaluator
        assert report is not None
        report.write(len(models))
        return Outcome(kind="completed", step=len(models))

    def _run_teacher_alone(self) -> Outcome:
        """Scores the teacher alone: the run has no student, and one step."""
        attempt, sets = self.scope.attempt, self.inputs.sets
        attempt.report("started", total_steps=1, step=0)
        columns = teacher_columns(self.rows)
        tokens = [float(each.example.num_targets) for each in self.rows]
        columns["tokens"] = np.asarray(tokens)[:, None]
        scores = {each.settings.name: set_scores(each, columns, of=TEACHER) for each in sets}
        found = self._teacher_scores(Evaluation(metrics={}, teacher=scores))
        named = {name: value for each in sets for name, value in metrics_of(each, found).items()}
        self.scope.reporter.metrics(1, named)
        log.info("evaluated", subject="teacher", **named)
        RunReport(attempt, {"source": "teacher"}).write_scores({"teacher": found}, 1)
        return Outcome(kind="completed", step=1)

    def _evaluator(self, config: StudentConfig) -> Evaluator:
        """Loads a model and returns what evaluates it."""
        scope, inputs, run = self.scope, self.inputs, self.scope.config
        accelerator = device.make_accelerator(run.optimizer)
        student = Student.load(
            config,
            inputs.tokenizer,
            data_dir=scope.data_dir,
            device=accelerator.device,
            precision=device.precision_of(accelerator),
            seed=run.optimizer.seed,
        )
        student.add_end_ids(inputs.corpus.end_ids)
        check_length(inputs.corpus, student)
        vocab_size = self.teacher_side.teachers.shared_vocab_size(len(inputs.tokenizer))
        cutter = cutter_of(run, student, accelerator.device)
        return Evaluator(
            student=student,
            head=LmHead(student),
            rows=self.rows,
            places=range(len(self.rows)),
            num_rows=len(self.rows),
            sets=inputs.sets,
            plan=choose_rows([each.example for each in self.rows], inputs.sets, run.evaluation.examples),
            accelerator=accelerator,
            cut=lambda rows: cutter.cut([len(each.example.token_ids) for each in rows]),
            vocab_size=vocab_size,
            writer=TextWriter(
                student,
                run.evaluation.generation,
                device=accelerator.device,
                autocast=accelerator.autocast,
                vocab_size=vocab_size,
                seed=run.data.seed,
            ),
            poll=lambda: scope.patience.check(None),
        )

    def _teacher_scores(self, outcome: Evaluation) -> Mapping[str, Mapping[str, RowSums]]:
        """Returns the teacher's own scores, with those of text that it writes where the student wrote some."""
        scores = {name: dict(each) for name, each in outcome.teacher.items()}
        config = self.scope.config
        wanted = [each for each in self.inputs.sets if each.settings.writes_text]
        if not wanted or len(config.teachers) != 1 or config.is_offline:
            return scores
        teachers = self.teacher_side.teachers
        if not isinstance(teachers, OnlineTeachers) or not teachers.members:
            teachers = connect_teachers(self.scope, self.inputs)
        generation = config.evaluation.generation or RolloutConfig(
            max_new_tokens=MAX_NEW_TOKENS, samples_per_prompt=1
        )
        [stream] = teachers.open_generators(generation, None).values()
        try:
            for each in wanted:
                texts = self._write(each, stream, generation, teachers.max_sequence_tokens)
                scores.setdefault(each.settings.name, {}).update(texts)
        finally:
            stream.close()
        return scores

    def _write(
        self, rows: EvaluationRows, stream: TextStream, generation: RolloutConfig, limit: int | None
    ) -> dict[str, RowSums]:
        """Lets the teacher write a text for each row of a set, and scores them."""
        examples = [self.rows[place].example for place in range(rows.begin, rows.end)]
        seed, [teacher] = self.scope.config.data.seed, self.scope.config.teachers

        def submit(number: int, example: Any) -> None:
            prompt = example.prompt_for(teacher.name)
            room = generation.max_new_tokens if limit is None else limit - len(prompt)
            stream.submit(
                rows.begin + number,
                prompt,
                # The wire has 64 bits.
                seed=text_seed(seed, rows.begin + number) % 2**63,
                max_new_tokens=max(1, min(generation.max_new_tokens, room)),
                place=example.place,
            )

        tokenizer, texts = self.inputs.tokenizer, []
        for number, _ in submit_ahead(examples, WINDOW_PROMPTS, submit):
            self.scope.patience.check(None)
            [sample] = stream.get_result(rows.begin + number, self.scope.patience)
            texts.append(tokenizer.decode(sample.token_ids.tolist(), skip_special_tokens=True))
        references = [reference_text(tokenizer, example) for example in examples]
        scores: dict[str, RowSums] = {}
        for metric in rows.settings.metrics:
            if metric in TEXT_METRICS:
                scores |= score_texts(
                    metric,
                    texts,
                    references,
                    match=rows.settings.match,
                    places=[example.place for example in examples],
                )
        return scores
