"""Fourth stage of set-up: the feeds of the run file's contexts, mixed into the source of steps."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.student_trainer.config.rules.contexts import is_ensemble, needs_query, rollout_services
from stillhouse.student_trainer.config.rules.loss import STUDENT_TAIL
from stillhouse.student_trainer.config.schema import ContextConfig, StudentContextConfig, TeacherContextConfig
from stillhouse.student_trainer.config.settled.staleness import max_staleness
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.checkpointing.checkpoint import TrainingState
from stillhouse.student_trainer.train.contexts.dataset_feed import DatasetFeed
from stillhouse.student_trainer.train.contexts.source import Feed, FeedSettings, StepSource
from stillhouse.student_trainer.train.contexts.student_feed import StudentFeed
from stillhouse.student_trainer.train.contexts.teacher_feed import TeacherFeed
from stillhouse.student_trainer.train.contexts.warm_start import WarmStart
from stillhouse.student_trainer.train.data.context_mix import ContextMix
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler
from stillhouse.student_trainer.train.rollouts.remote_sampler import RemoteSampler
from stillhouse.student_trainer.train.rollouts.sampler_pool import SamplerPool
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.setup.student_side import StudentSide
from stillhouse.student_trainer.train.setup.teacher_side import TeacherSide
from stillhouse.student_trainer.train.teacher.target_requests import dataset_request, training_request


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedFactory:
    """Makes feeds out of the stages before."""

    scope: RunScope
    inputs: Inputs
    teacher_side: TeacherSide
    student_side: StudentSide
    state: TrainingState
    """Restored from the run's checkpoint, if there is one."""

    def open_source(self) -> StepSource:
        """The contexts of the run, mixed by weight. Raises Stopped, or StillhouseError of a rollout service."""
        config, ranks = self.scope.config, self.scope.ranks
        mix = ContextMix(
            weights=[each.weight for each in config.contexts],
            schedule=self.student_side.schedule,
            seed=config.data.seed,
        )
        feeds = [self.make_feed(context, number) for number, context in enumerate(config.contexts)]
        ranks.exchange(None, patient=True)  # an earlier attempt's leftovers on services are gone for all
        return StepSource(feeds, mix, ranks.rank, ranks.size)

    def make_feed(self, context: ContextConfig, number: int) -> Feed:
        """The feed of `contexts[number]`."""
        if context.teacher is not None:
            return self._make_teacher_feed(context, context.teacher, number)
        if context.student is not None:
            return self._make_student_feed(context, context.student, number)
        loss = self.scope.config.loss_of(context)
        targets = None
        if loss.asks_teacher:
            request = dataset_request(
                self.scope.config, loss, class_order=self.student_side.student.class_names
            )
            targets = self.teacher_side.teachers.open_stream(request)
            self.scope.stack.callback(targets.close)
        return DatasetFeed(self._settings(number), targets)

    def _make_teacher_feed(
        self, context: ContextConfig, config: TeacherContextConfig, number: int
    ) -> TeacherFeed:
        loss = self.scope.config.loss_of(context)
        request = training_request(loss, self._seed) if loss.asks_teacher else None
        streams = self.teacher_side.teachers.open_generators(config.generation, request)
        for stream in streams.values():
            self.scope.stack.callback(stream.close)
        return TeacherFeed(
            self._settings(number), streams, config.generation, vocab_size=self.student_side.vocab_size
        )

    def _make_student_feed(
        self, context: ContextConfig, config: StudentContextConfig, number: int
    ) -> StudentFeed:
        run, teachers = self.scope.config, self.teacher_side.teachers
        loss = run.loss_of(context)
        queries_top_k = needs_query(loss)
        targets = teachers.open_stream(training_request(loss, self._seed), cacheable=False)
        self.scope.stack.callback(targets.close)
        top_k = min(loss.least_top_k, teachers.max_query_tokens) if queries_top_k else 0
        num_draws = (loss.num_samples or 0) if loss.sparse_target == STUDENT_TAIL else 0
        gate = WarmStart(
            config.min_teacher_logprob,
            vocab_size=self.student_side.vocab_size,
            alone=len(run.contexts) == 1,
            field_path=f"contexts[{number}].student",
            is_open=self.state.progress.step > 0,
        )
        return StudentFeed(
            self._settings(number),
            targets,
            self._make_sampler(
                config,
                number,
                top_k,
                num_draws,
            ),
            config,
            in_flight=self.state.in_flight,
            version=self.state.progress.version,
            gate=gate,
            queries_top_k=queries_top_k,
            queries_parts=lambda: teachers.reuse_prefixes,
            teachers_per_query=len(run.teachers) if is_ensemble(run) else 1,
            # A run that no service has created settles it here.
            max_staleness=max_staleness(
                run, config, on_cpu=self.student_side.accelerator.device.type == "cpu"
            ),
        )

    def _make_sampler(
        self, config: StudentContextConfig, number: int, top_k: int, num_draws: int
    ) -> LocalSampler | SamplerPool:
        """The student's sampler: in this process, or on the rollout services of `config`."""
        targets, scope, side = rollout_services(config), self.scope, self.student_side
        if not targets:
            return LocalSampler(
                side.student,
                device=side.accelerator.device,
                autocast=side.accelerator.autocast,
                vocab_size=side.vocab_size,
                num_likeliest=top_k,
                num_draws=num_draws,
                pass_tokens=lambda: side.stepper.cutter.max_tokens,
            )

        samplers = [
            RemoteSampler(
                TeacherConfig(
                    targets=(target,),
                    credential=config.rollout_credential,
                    tls_server_name=config.rollout_tls_server_name,
                ),
                field=f"contexts[{number}].student",
                run_name=scope.run_dir.path.name,
                tokenizer_fingerprint=self.inputs.tokenizer_fingerprint,
                vocab_size=side.vocab_size,
                num_likeliest=top_k,
                num_draws=num_draws,
                end_ids=side.student.end_ids,
                clean=scope.ranks.is_first,
            )
            for target in targets
        ]
        sampler = SamplerPool(
            side.student, samplers, version=self.state.progress.version, patience=scope.patience
        )
        scope.stack.callback(sampler.close)
        return sampler

    def _settings(self, number: int) -> FeedSettings:
        teachers = self.teacher_side.teachers
        limits = (
            self.scope.config.data.max_sequence_tokens,
            self.student_side.student.max_positions,
            teachers.max_sequence_tokens,
        )
        return FeedSettings(
            context=number,
            examples=self.teacher_side.corpus.train,
            seed=self._seed,
            ahead=teachers.prefetch_steps,
            max_sequence_tokens=min(limit for limit in limits if limit is not None),
            sequence_limits=teachers.sequence_limits,
            patience=self.scope.patience,
        )

    @property
    def _seed(self) -> int:
        return self.scope.config.data.seed
