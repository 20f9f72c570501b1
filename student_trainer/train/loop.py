"""A run from its configuration to its final model: what happens in which order, and nothing of how."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.check_cross_tokenizer import chunk_loss, evaluation_top_k, is_bridged
from stillhouse.student_trainer.config.checks import TEACHER_METRICS
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train import evaluate
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.checkpointing import checkpoint
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress, TrainingState
from stillhouse.student_trainer.train.checkpointing.matmul_dtype import kept_matmul_dtype
from stillhouse.student_trainer.train.checkpointing.triggers import Triggers
from stillhouse.student_trainer.train.contexts.factory import Parts, make_feed
from stillhouse.student_trainer.train.contexts.source import StepData, StepSource
from stillhouse.student_trainer.train.cross_tokenizer.bridge_corpus import bridge
from stillhouse.student_trainer.train.data.context_mix import Mix
from stillhouse.student_trainer.train.data.corpus import Corpus, load_corpus
from stillhouse.student_trainer.train.data.schedule import Schedule
from stillhouse.student_trainer.train.distributed.ranks import Ranks, merged
from stillhouse.student_trainer.train.optim import make_optimizer
from stillhouse.student_trainer.train.process.outcome import Outcome
from stillhouse.student_trainer.train.process.reporter import Reporter
from stillhouse.student_trainer.train.process.waiting import Patience, Stopped
from stillhouse.student_trainer.train.rollouts.rollout_buffer import InFlight
from stillhouse.student_trainer.train.runtime_metrics import vitals
from stillhouse.student_trainer.train.step import Stepper
from stillhouse.student_trainer.train.student import device
from stillhouse.student_trainer.train.student.export import export
from stillhouse.student_trainer.train.student.student import Student, load_tokenizer
from stillhouse.student_trainer.train.teacher.answers import evaluation_request
from stillhouse.student_trainer.train.teacher.offline_teachers import StoredTeachers
from stillhouse.student_trainer.train.teacher.queries import evaluation_questions, training_questions
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.teacher import Demands
from stillhouse.student_trainer.train.teacher.teachers import Teachers

log = structlog.get_logger()

MAX_SKIPPED_IN_A_ROW = 3
"""Steps in a row whose loss is no number, after which a run fails."""


def train(
    config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool], ranks: Ranks | None = None
) -> Outcome:
    """Runs `config` from its last checkpoint to its end, or until it shall stop.

    Of several `ranks` every one calls this; they take each step together and end together.

    Raises:
        StillhouseError: for all that a user can cause; nothing up to the last checkpoint is lost.
    """
    progress, ranks = Progress(), ranks or Ranks()
    with ExitStack() as stack:
        try:
            run = _Run.prepare(config, attempt, progress, stop_requested, stack=stack, ranks=ranks)
        except Stopped:
            return Outcome(kind="stopped", step=progress.step)
        try:
            run.evaluate_at_start()
            for data in ranks.together(run.source.steps(after=progress.step), stop_requested):
                metrics = run.stepper.take(data, progress)
                settled = run.settle(data, stop=stop_requested())
                run.report({**metrics, **settled.metrics})
                run.refuse_nonsense()
                if run.due.evaluation(progress.step):
                    run.evaluate()
                if settled.stop:
                    raise Stopped  # noqa: TRY301 - the same way out as from a wait
                # A checkpoint amid steps that failed would be no place to go on from.
                if settled.save and not progress.skipped_in_a_row:
                    run.save()
            run.save()
            run.evaluate_at_end()
        except Stopped:
            run.save()
            return Outcome(kind="stopped", step=progress.step)
        if ranks.is_first:
            export(run.student, attempt)
    return Outcome(kind="completed", step=progress.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What the processes of a run agree on after a step."""

    stop: bool
    save: bool
    """Whether a checkpoint is due."""
    metrics: Mapping[str, float]
    """Of all contexts in all processes."""


class _Run:
    """The parts of a run, ready to take steps."""

    def __init__(self, config: RunConfig, attempt: Attempt, progress: Progress, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.attempt = attempt
        self.progress = progress
        self.student: Student
        self.stepper: Stepper
        self.source: StepSource
        self.due: Triggers
        self._accelerator: Any
        self._reporter: Reporter
        self._trained: TrainingState
        self._schedule: Schedule
        self._held_out: list[ScoredExample]
        self._vitals: Callable[[], Mapping[str, float]]
        self._num_held_out: int
        self._vocab_size: int
        self._facts: dict[str, str]
        self._saved_step: int | None = None
        self._evaluated_step: int | None = None

    @classmethod
    def prepare(
        cls,
        config: RunConfig,
        attempt: Attempt,
        progress: Progress,
        stop_requested: Callable[[], bool],
        *,
        stack: ExitStack,
        ranks: Ranks,
    ) -> _Run:
        """Reads the data, checks the teacher, loads the student and its last checkpoint; in the order of what fails fastest."""
        run = cls(config, attempt, progress, ranks)
        run._reporter = stack.enter_context(Reporter(attempt))
        data_dir = attempt.run_dir.path.resolve().parent.parent
        patience = Patience(attempt, stop_requested, config.retry.teacher_wait_s)

        tokenizer = load_tokenizer(config.student, data_dir)
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        fingerprint = tokenizer_fingerprint(tokenizer_json, tokenizer.special_tokens_map)
        names = [teacher.name for teacher in config.teachers]
        corpus = load_corpus(config.data, config.evaluation, tokenizer, data_dir, names)
        demands = Demands.of(config, fingerprint, tokenizer_json, corpus)
        teachers: Teachers | StoredTeachers | None = None
        if is_bridged(config):  # what a teacher with a tokenizer of its own is asked about depends on that
            teachers = ranks.after_first(
                lambda: _reach(
                    config, corpus, demands, attempt, patience=patience, stack=stack, ask_now=False
                )
            )
            corpus = bridge(config, corpus, teachers.members, tokenizer)
        answers = evaluate.load_answers(attempt.run_dir, corpus.eval, evaluation_top_k(config))
        wants_answers = bool(
            config.has_teacher and corpus.eval and TEACHER_METRICS & set(config.evaluation.metrics)
        )
        # The first process asks, and all go by what it found.
        ask_now = ranks.exchange(wants_answers and answers is None, patient=True)[0]
        if teachers is None and (config.asks_teacher or ask_now):
            teachers = ranks.after_first(
                lambda: _reach(
                    config, corpus, demands, attempt, patience=patience, stack=stack, ask_now=ask_now
                )
            )

        run._accelerator = device.make_accelerator(config.optimizer)
        precision = device.precision_of(run._accelerator)
        run.student = Student.load(
            config.student,
            tokenizer,
            data_dir=data_dir,
            device=run._accelerator.device,
            precision=precision,
            seed=config.optimizer.seed,
        )
        _check_length(corpus, run.student)
        run._vocab_size = len(tokenizer)
        if teachers and not is_bridged(config):
            run._vocab_size = min(len(tokenizer), teachers.tokenizer_size)
        weights = [each.weight for each in config.data.train if each.weight is not None]
        run._schedule = Schedule.of(
            len(corpus.train), config.optimizer, config.data.seed, corpus.parts, weights
        )
        optimizer = make_optimizer(run.student.trained(), config.optimizer)
        run.stepper = Stepper(
            run.student,
            optimizer,
            run._accelerator,
            config,
            total_steps=run._schedule.total_steps,
            vocab_size=run._vocab_size,
            ranks=ranks,
        )
        run._trained = TrainingState(
            model=run.student.model,
            optimizer=optimizer,
            scaler=run._accelerator.scaler,
            progress=progress,
        )
        run._facts = {
            "config_sha256": hashlib.sha256(attempt.run_dir.effective_spec_path.read_bytes()).hexdigest(),
            "tokenizer_fingerprint": fingerprint,
            "teacher_fingerprint": teachers.fingerprint if teachers else "",
        }
        run._restore()
        run.due = Triggers(config.checkpoint, config.evaluation, run._schedule)
        run._reporter.resume_at(progress.step)
        attempt.report("started", total_steps=run._schedule.total_steps, step=progress.step)
        log.info("training", step=progress.step, total_steps=run._schedule.total_steps, precision=precision)

        if ask_now and teachers:
            answers = ranks.after_first(lambda: run._answers(corpus, teachers, patience))
        plain = [ScoredExample(example=example, answer=None) for example in corpus.eval]
        held_out = answers if answers is not None and wants_answers else plain
        run._num_held_out = len(held_out)
        run._held_out = [each for number, each in enumerate(held_out) if ranks.is_mine(number)]
        run._vitals = partial(vitals, teachers, run._accelerator.device)
        parts = Parts(
            config=config,
            corpus=corpus,
            teachers=teachers if config.asks_teacher else None,
            student=run.student,
            vocab_size=run._vocab_size,
            run_name=attempt.run_dir.path.name,
            tokenizer_fingerprint=fingerprint,
            in_flight=run._trained.in_flight,
            version=lambda: progress.step - progress.skipped_steps,
            is_resumed=progress.step > 0,
            device=run._accelerator.device,
            autocast=run._accelerator.autocast,
            patience=patience,
            stack=stack,
            is_first=ranks.is_first,
        )
        mix = Mix(
            weights=[each.weight for each in config.contexts], schedule=run._schedule, seed=config.data.seed
        )
        feeds = [make_feed(context, number, parts) for number, context in enumerate(config.contexts)]
        ranks.exchange(None, patient=True)  # what an earlier attempt has left elsewhere is gone for all
        run.source = StepSource(feeds, mix, ranks.is_mine)
        return run

    def _restore(self) -> None:
        """Takes over the last checkpoint, which the first process has found whole; all begin with the same weights and type."""
        found = checkpoint.restore(self.attempt, self._trained) if self.ranks.is_first else None
        dtype = kept_matmul_dtype(self.config, self.attempt, found, self._accelerator)
        found, dtype = self.ranks.exchange((found, dtype), patient=True)[0]
        self.stepper.multiply_in(dtype)
        self._facts["matmul_dtype"] = dtype or ""
        if found is not None and not self.ranks.is_first:
            checkpoint.restore_step(self.attempt.run_dir, found, self._trained)
        self._trained.in_flight.keep(self.ranks.is_mine)
        self.ranks.share(self.student.trained().values())
        self._saved_step = found

    def _answers(
        self, corpus: Corpus, teachers: Teachers | StoredTeachers, patience: Patience
    ) -> list[ScoredExample] | None:
        """The teacher's answers for the held-out rows: the first process asks for them, the others read what it stored."""
        run_dir, top_k = self.attempt.run_dir, evaluation_top_k(self.config)
        if not self.ranks.is_first:
            return evaluate.load_answers(run_dir, corpus.eval, top_k)
        asked = teachers.answers(evaluation_request(top_k), fixed_text=True, held_out=True)
        try:
            answers = evaluate.ask(corpus.eval, asked, patience)
        finally:
            asked.close()
        evaluate.store_answers(run_dir, answers, top_k)
        return answers

    def settle(self, data: StepData, *, stop: bool) -> Settled:
        """What all processes say after a step."""
        self._trained.in_flight.forget_before(self.progress.step)
        own = {
            "stop": stop,
            "save": self.due.checkpoint(self.progress.step),
            "weight": len(data.scored),
            "metrics": {"train/teacher_wait_s": data.teacher_wait_s, **data.metrics, **self._vitals()},
            "asked": self.source.num_asked,
        }
        told = self.ranks.exchange(own)
        asked = float(sum(each["asked"] for each in told))
        metrics = merged([(each["weight"], each["metrics"]) for each in told])
        return Settled(
            stop=any(each["stop"] for each in told),
            save=any(each["save"] for each in told),
            metrics={**metrics, "teacher/sequences_asked": asked},
        )

    def report(self, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of the step just taken."""
        epoch = self._schedule.epochs(self.progress.step)
        self._reporter.metrics(self.progress.step, {**metrics, "train/epoch": epoch})

    def refuse_nonsense(self) -> None:
        """Return unless the last steps were no numbers, one after the other. Raises StillhouseError(NON_FINITE)."""
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise StillhouseError(
                Reason.NON_FINITE,
                f"The loss or its gradient was no number in {self.progress.skipped_in_a_row} steps in a row, up to step "
                f"{self.progress.step}. {checkpoint.last_good(self.attempt.run_dir)} Lower optimizer.learning_rate, or "
                "use optimizer.precision: fp32.",
            )

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one or there is nothing to keep."""
        step = self.progress.step
        if step in (0, self._saved_step):
            return
        began = time.monotonic()
        self._trained.in_flight.forget_before(step)
        parts = self.ranks.gather(self._trained.in_flight.to_bytes())
        self._saved_step = step
        self.due.saved()
        if not self.ranks.is_first:
            return
        in_flight = InFlight.joined(InFlight.from_bytes(part) for part in parts)
        whole = dataclasses.replace(self._trained, in_flight=in_flight)
        checkpoint.save(self.attempt, whole, self._facts, keep=self.config.checkpoint.keep)
        self.due.saved()
        self.attempt.report("checkpoint", step=step)
        log.info("checkpoint written", step=step, time_s=round(time.monotonic() - began, 3))

    def evaluate_at_start(self) -> None:
        """What the student is before it learns; a resumed run has it already."""
        if self.progress.step == 0:
            self.evaluate()

    def evaluate_at_end(self) -> None:
        """What it has become, unless the last step was evaluated."""
        if self._evaluated_step != self.progress.step:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluates on the held-out rows, if there are any, and reports."""
        self._evaluated_step = self.progress.step
        if not self._num_held_out:
            return
        metrics = evaluate.evaluate(
            self.student,
            self._held_out,
            batch_size=self.config.optimizer.micro_batch_size,
            device=self._accelerator.device,
            autocast=self._accelerator.autocast,
            vocab_size=self._vocab_size,
            total=self.ranks.sums,
            chunk_loss=chunk_loss(self.config) if is_bridged(self.config) else None,
        )
        self._reporter.metrics(self.progress.step, metrics)
        log.info("evaluated", step=self.progress.step, **metrics)


def _reach(
    config: RunConfig,
    corpus: Corpus,
    demands: Demands,
    attempt: Attempt,
    *,
    patience: Patience,
    stack: ExitStack,
    ask_now: bool,
) -> Teachers | StoredTeachers:
    """The teachers, or what a cache remembers of them; `ask_now` whether held-out rows have no answers yet."""
    run_dir = attempt.run_dir
    data_dir = run_dir.path.resolve().parent.parent
    if config.is_offline:
        questions = training_questions(config, corpus)
        questions += evaluation_questions(config, corpus) if ask_now else []
        student = demands.tokenizer_fingerprint
        return StoredTeachers.find(
            config, questions, student, run_dir=run_dir, data_dir=data_dir, stack=stack
        )
    cache = RunCache.open(config.cache, data_dir, stack)
    return Teachers.connect(config, demands, run_dir, patience=patience, stack=stack, cache=cache)


def _check_length(corpus: Corpus, student: Student) -> None:
    longest, limit = corpus.longest, student.max_positions
    if limit is not None and len(longest.token_ids) > limit:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{longest.place} has {len(longest.token_ids)} tokens; the student was made for at most {limit}. "
            f"Set data.max_sequence_tokens: {limit}.",
            metadata={"value": str(len(longest.token_ids)), "limit": str(limit)},
        )
