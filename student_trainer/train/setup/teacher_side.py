"""Second stage of set-up: the run's teachers, reached and checked, and the corpus in the tokens that they read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stillhouse.student_trainer.config.rules.cross_tokenizer import is_bridged
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.train.cross_tokenizer.bridge_corpus import translate_for_teachers
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.setup.held_out import HeldOutRows
from stillhouse.student_trainer.train.setup.hidden_layers import settle_hidden_layers
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.setup.target_settlement import settle_targets
from stillhouse.student_trainer.train.teacher.offline_teachers import OfflineTeachers
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.target_requests import evaluation_requests, training_requests
from stillhouse.student_trainer.train.teacher.target_source import TargetSource
from stillhouse.student_trainer.train.teacher.teacher import Demands


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSide:
    """The source of targets, and the rows that it gives them for."""

    teachers: TargetSource
    corpus: Corpus
    """With the text in a foreign teacher's tokens too, where the run is bridged."""
    held_out: HeldOutRows
    config: RunConfig
    """The run's configuration, with the targets of all losses settled."""

    @classmethod
    def connect(cls, scope: RunScope, inputs: Inputs) -> TeacherSide:
        """Reaches the teachers that the run needs: none, services, or a cache. Raises Stopped, StillhouseError."""
        config, ranks = scope.config, scope.ranks
        if is_bridged(config):  # the queries depend on the teacher's tokenizer
            online = ranks.after_first(lambda: connect_teachers(scope, inputs))
            corpus = translate_for_teachers(config, inputs.corpus, online.members, inputs.tokenizer)
            held_out = HeldOutRows.lookup(scope, corpus)
            return cls(teachers=online, corpus=corpus, held_out=held_out, config=config)
        held_out = HeldOutRows.lookup(scope, inputs.corpus)
        teachers: TargetSource = OnlineTeachers({}, mixed=False, cache=None)
        if config.is_offline and (config.asks_teacher or held_out.must_query):
            cache = ranks.after_first(lambda: _open_cache(scope))
            config = settle_targets(scope, cache=cache)
            settled = replace(scope, config=config)
            teachers = ranks.after_first(lambda: _open_offline(settled, inputs, held_out, cache))
        elif config.asks_teacher or held_out.must_query:
            online = ranks.after_first(lambda: connect_teachers(scope, inputs))
            config = settle_online(scope, inputs, online)
            teachers = online
        return cls(teachers=teachers, corpus=inputs.corpus, held_out=held_out, config=config)


def connect_teachers(scope: RunScope, inputs: Inputs) -> OnlineTeachers:
    """Opens the run's cache, if it has one, and reaches its teachers. Raises Stopped, StillhouseError."""
    cache = RunCache.open(scope.config.cache, scope.data_dir, scope.stack)
    return OnlineTeachers.connect(
        scope.config,
        _demands(scope.config, inputs),
        scope.run_dir,
        patience=scope.patience,
        stack=scope.stack,
        cache=cache,
    )


def settle_online(scope: RunScope, inputs: Inputs, teachers: OnlineTeachers) -> RunConfig:
    """The configuration with the targets that `teachers` can give, which they are held to from now on. Raises StillhouseError."""
    config = settle_targets(scope, teachers=teachers, cache=teachers.cache)
    config = settle_hidden_layers(scope, config, teachers, inputs.corpus)
    if config != scope.config:
        teachers.demand(_demands(config, inputs))
    return config


def _demands(config: RunConfig, inputs: Inputs) -> Demands:
    return Demands.from_config(
        config,
        inputs.tokenizer_fingerprint,
        inputs.tokenizer_json,
        inputs.corpus,
        inputs.end_ids,
    )


def _open_cache(scope: RunScope) -> RunCache:
    cache = RunCache.open(scope.config.cache, scope.data_dir, scope.stack)
    assert cache is not None, "the configuration names a cache"
    return cache


def _open_offline(scope: RunScope, inputs: Inputs, held_out: HeldOutRows, cache: RunCache) -> OfflineTeachers:
    requests = training_requests(scope.config)
    if held_out.must_query:
        requests += evaluation_requests(scope.config, inputs.corpus)
    return OfflineTeachers.open(
        scope.config,
        requests,
        inputs.corpus,
        inputs.tokenizer_fingerprint,
        run_dir=scope.run_dir,
        cache=cache,
    )
