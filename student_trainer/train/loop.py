"""The training loop: a run from its set-up to its final model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import Attempt, TrainedRecord
from stillhouse.student_trainer.train.checkpointing import checkpoint
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress
from stillhouse.student_trainer.train.contexts.source import StepData
from stillhouse.student_trainer.train.distributed.ranks import Ranks, merge_metrics
from stillhouse.student_trainer.train.evaluation.example_files import Subject
from stillhouse.student_trainer.train.process.memory import memory_of
from stillhouse.student_trainer.train.process.waiting import Stopped
from stillhouse.student_trainer.train.setup.pass_trial import fit_passes
from stillhouse.student_trainer.train.setup.run_context import RunContext, set_up
from stillhouse.student_trainer.train.setup.scope import Outcome, RunScope, open_scope
from stillhouse.student_trainer.train.setup.trained import load_trained
from stillhouse.student_trainer.train.student.export import export
from stillhouse.student_trainer.train.student.model_card import write_cards
from stillhouse.student_trainer.train.student.student import Student

log = structlog.get_logger()

MAX_SKIPPED_IN_A_ROW = 3
"""Consecutive steps with a non-finite loss or gradient, after which a run fails."""


def train(
    config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool], ranks: Ranks | None = None
) -> Outcome:
    """Runs `config` from its last checkpoint to its end, or until it is asked to stop; exports alone if all steps are taken.

    Every one of several `ranks` calls this; they take each step together and end together.

    Raises:
        StillhouseError: for all that a user can cause; nothing up to the last checkpoint is lost.
    """
    progress = Progress()
    with open_scope(config, attempt, stop_requested, ranks) as scope:
        trained = load_trained(scope)
        if trained is not None:
            _export(scope, trained.student)
            return Outcome(kind="completed", step=trained.step)
        try:
            run = set_up(scope, progress)
        except Stopped:
            return Outcome(kind="stopped", step=progress.step)
        evaluated_step = None
        try:
            if progress.step == 0:
                evaluated_step = _evaluate(run)
            for data in _steps(run, stop_requested):
                metrics = run.student_side.stepper.take_step(data, progress)
                agreed = _agree(run, data, stop=stop_requested())
                epoch = run.student_side.schedule.epochs(progress.step)
                scope.reporter.metrics(progress.step, {**metrics, **agreed.metrics, "train/epoch": epoch})
                _refuse_non_finite(run)
                if run.triggers.should_evaluate(progress.step):
                    evaluated_step = _evaluate(run)
                if agreed.stop:
                    raise Stopped  # noqa: TRY301 - the same way out as from a wait
                # No run should resume amid steps that failed.
                if agreed.save and not progress.skipped_in_a_row:
                    run.checkpointer.save()
            if evaluated_step != progress.step and run.best.is_wanted:
                evaluated_step = _evaluate(run)  # first, so that the checkpoint knows which one is the best
            run.checkpointer.save()
            if evaluated_step != progress.step:
                _evaluate(run)
        except Stopped:
            run.checkpointer.save()
            return Outcome(kind="stopped", step=progress.step)
        if scope.ranks.is_first:
            _finish(run)
        _export(scope, run.student_side.student)
    return Outcome(kind="completed", step=progress.step)


def _finish(run: RunContext) -> None:
    """Gives the student the weights that are exported, and records that every step was taken."""
    last, student, attempt = run.state.progress.step, run.student_side.student, run.scope.attempt
    step = run.best.exported_step(last)
    if step != last:
        log.info("the best checkpoint is exported", step=step, last_step=last)
        checkpoint.restore_weights(run.scope.run_dir, step, student.model)
    run.report.write(step)
    record = TrainedRecord(
        step=step, end_ids=tuple(student.end_ids), last_step=last, class_names=student.class_names
    )
    attempt.mark_trained(record)


def _export(scope: RunScope, student: Student) -> None:
    if scope.ranks.is_first:
        with memory_of(lambda: "The export of the trained model"):
            export(student, scope.attempt, describe=partial(_describe, scope))


def _describe(scope: RunScope, directory: Path) -> None:
    student = scope.config.student
    is_adapter = student.trains_adapter and student.output == "adapter"
    write_cards(directory, scope.config, scope.run_dir, is_adapter=is_adapter)


def _steps(run: RunContext, stop_requested: Callable[[], bool]) -> Iterator[StepData]:
    """Tries the largest pass with the first sequences, while the others are computed, and yields the data of each step."""
    ranks, after = run.scope.ranks, run.state.progress.step
    if after >= run.student_side.schedule.total_steps:
        return
    with _kept(run):
        samples = ranks.agree(partial(run.source.samples, after))
    fit_passes(run, samples)
    with _kept(run):
        yield from ranks.in_lockstep(run.source.steps(after), stop_requested)


@contextlib.contextmanager
def _kept(run: RunContext) -> Iterator[None]:
    """Within the context, an error of a wait for data, such as that of a lost teacher, costs no step taken."""
    progress = run.state.progress
    try:
        yield
    except StillhouseError:
        # Other processes of the run may be gone, and a save needs all.
        if run.scope.ranks.size == 1 and not progress.skipped_in_a_row:
            with contextlib.suppress(OSError, StillhouseError):
                run.checkpointer.save()
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class _Agreement:
    """Decisions and metrics that all processes of a run share after a step."""

    stop: bool
    save: bool
    metrics: Mapping[str, float]


def _agree(run: RunContext, data: StepData, *, stop: bool) -> _Agreement:
    """Exchanges stop requests, due checkpoints and metrics."""
    run.state.in_flight.drop_before(run.state.progress.step)
    own = {
        "stop": stop,
        "save": run.triggers.should_save(run.state.progress.step),
        "weight": len(data.scored),
        "metrics": {"train/teacher_wait_s": data.teacher_wait_s, **data.metrics, **run.runtime_metrics()},
        "asked": run.source.num_asked,
    }
    told = run.scope.ranks.exchange(own)
    metrics = merge_metrics([(each["weight"], each["metrics"]) for each in told])
    return _Agreement(
        stop=any(each["stop"] for each in told),
        save=any(each["save"] for each in told),
        metrics={**metrics, "teacher/sequences_asked": float(sum(each["asked"] for each in told))},
    )


def _evaluate(run: RunContext) -> int:
    """Evaluates on the held-out rows, if there are any, and reports; the step."""
    progress = run.state.progress
    step = progress.step
    with memory_of(lambda: f"The evaluation at step {step}"):
        evaluation = run.evaluator.evaluate()
    metrics = evaluation.metrics
    if metrics:
        run.scope.reporter.metrics(step, metrics)
        log.info("evaluated", step=step, **metrics)
    is_last = step == run.student_side.schedule.total_steps
    if step == 0:
        run.report.keep("before", step, evaluation)
    # No run should resume amid steps that failed.
    elif run.best.is_wanted:
        if not progress.skipped_in_a_row and run.best.see(step, metrics):
            run.report.keep("after", step, evaluation)
    elif is_last:
        run.report.keep("after", step, evaluation)
    subject: Subject = "before" if step == 0 else "after" if is_last else "along"
    run.examples.write(step, subject, evaluation.examples, protected=[run.best.step or 0])
    return step


def _refuse_non_finite(run: RunContext) -> None:
    """Raises StillhouseError(NON_FINITE) once too many consecutive steps changed no weight."""
    if run.state.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise StillhouseError(
            Reason.NON_FINITE,
            f"The loss or its gradient was NaN or infinite in {run.state.progress.skipped_in_a_row} steps in a row, up to step "
            f"{run.state.progress.step}. {checkpoint.last_good(run.scope.run_dir)} Lower optimizer.learning_rate, or "
            "use optimizer.precision: fp32.",
        )
