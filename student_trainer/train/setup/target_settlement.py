"""Settles `sparse_target: auto` at the first handshake, or from a cache's columns, and keeps the outcome with the run.

The first process decides; the effective spec, in the run directory and in the service's store, then holds the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import structlog

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_QUERY_LOGPROBS,
    CAPABILITY_SAMPLED_TOKENS,
    CAPABILITY_STRATIFIED_SAMPLES,
    CAPABILITY_TAIL_SAMPLES,
)
from stillhouse.student_trainer.config.rules.contexts import run_losses
from stillhouse.student_trainer.config.rules.loss import (
    DRAWN_TARGETS,
    STUDENT_TAIL,
    TAIL_TARGETS,
    needs_draw_logprobs,
    takes_draw_logprobs,
)
from stillhouse.student_trainer.config.schema import LossConfig, RunConfig
from stillhouse.student_trainer.config.settled.target_choice import (
    TargetChoice,
    contexts_of,
    has_few_draws,
    settle,
    settle_config,
    settle_spec,
    suits_own_draws,
    suits_plain_draws,
    unsettled,
    was_settled_without_logprobs,
)
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.target_requests import training_request

log = structlog.get_logger()

EMPTY_CACHE = "the cache holds no targets that fit yet"
"""Reason of a run that a cache alone feeds, and that cannot train with what it holds: nothing is settled by it."""


def settle_targets(
    scope: RunScope, *, teachers: OnlineTeachers | None = None, cache: RunCache | None = None
) -> RunConfig:
    """The run's configuration without `auto`: as `cache` holds targets already, else as `teachers` can draw.

    Writes what the first process decides to the run directory and reports it. All processes call this together.
    """
    config = scope.config
    if config.classifies:  # teachers send all classes
        return config
    own = {path: _choose(config, loss, teachers, cache).to_json() for path, loss in unsettled(config)}
    own |= {path: each.to_json() for path, each in _earlier_choices(config, teachers, cache).items()}
    if own:
        told = scope.ranks.exchange(own, patient=True)[0]
        choices = {path: TargetChoice.from_json(value) for path, value in told.items()}
        config = settle_config(config, choices)
        if scope.attempt.writes and all(
            each.sparse_target_reason != EMPTY_CACHE for each in choices.values()
        ):
            # Reported first: what is in the file is not decided, nor reported, again.
            scope.attempt.report("settled", targets=told)
            effective = scope.run_dir.effective_spec()
            settle_spec(effective, choices)
            scope.run_dir.write_effective_spec(effective)
    log_targets(config)
    return config


def log_targets(config: RunConfig) -> None:
    """Logs the target of every loss that counts, with the reason."""
    for path, loss in run_losses(config):
        if loss.asks_teacher:
            log.info(
                "target of the tokens beyond top_k",
                loss=path,
                sparse_target=loss.sparse_target,
                top_k=loss.top_k,
                num_samples=loss.num_samples if loss.sparse_target in (*DRAWN_TARGETS, STUDENT_TAIL) else 0,
                why=loss.sparse_target_reason or "the run file says so",
            )
            if has_few_draws(loss):
                # Measured: docs/concepts/targets.md.
                log.warning(
                    "with a flat teacher these draws keep less than 95 % of what its whole vocabulary would give",
                    loss=path,
                    num_samples=loss.num_samples,
                    remedy="leave num_samples and sparse_target out, with a teacher of this version",
                )


def _choose(
    config: RunConfig, loss: LossConfig, teachers: OnlineTeachers | None, cache: RunCache | None
) -> TargetChoice:
    """The target of a loss that draws would suit."""
    if suits_own_draws(config, loss) and teachers is not None:
        return _choose_own_draws(config, loss, teachers)
    stored = None if cache is None else _stored_choice(config, loss, cache, teachers)
    if stored is not None:
        return stored
    if teachers is None:
        return TargetChoice.bucket(loss, EMPTY_CACHE)
    members = teachers.members
    names = ", ".join(
        dict.fromkeys(term.divergence for term in loss.terms if term.weight > 0 and term.estimator == "full")
    )
    unbiased = f"{names} at temperature {loss.temperature:g} has an unbiased estimate from that"
    without = {
        capability: [
            f"{name or each.endpoints[0].target} ({each.info.engine})"
            for name, each in members.items()
            if capability not in each.info.capabilities
        ]
        for capability in (CAPABILITY_STRATIFIED_SAMPLES, CAPABILITY_TAIL_SAMPLES, CAPABILITY_SAMPLED_TOKENS)
    }
    vocab_size = max(each.info.vocab_size for each in members.values())
    choose = partial(TargetChoice.draws, loss, vocab_size=vocab_size)
    from_tail = f"the teacher draws from its tail, and {unbiased}"
    if not without[CAPABILITY_STRATIFIED_SAMPLES]:
        return choose(from_tail, form="stratified_tail")
    if suits_plain_draws(loss) and not without[CAPABILITY_SAMPLED_TOKENS]:
        # Twice as many draws in the same bytes: they need no log-probabilities here.
        return choose(f"the teacher draws, and {unbiased}", form="top_k_and_sampled")
    if not without[CAPABILITY_TAIL_SAMPLES]:
        return choose(from_tail, form="sampled_tail")
    max_top_k = min(each.info.max_top_k for each in members.values())
    why = f"the teacher {', '.join(without[CAPABILITY_TAIL_SAMPLES])} does not draw from its tail"
    return TargetChoice.bucket(loss, why, max_top_k=max_top_k)


def _choose_own_draws(config: RunConfig, loss: LossConfig, teachers: OnlineTeachers) -> TargetChoice:
    """The target of reverse KL on the student's own texts."""
    infos = [each.info for each in teachers.members.values()]
    choice = TargetChoice.own_draws(
        loss,
        "the student draws from its own tail, and reverse_kl at temperature 1 has an unbiased estimate from that",
        max_query_tokens=teachers.max_query_tokens,
        max_new_tokens=max(
            context.student.generation.max_new_tokens
            for context in contexts_of(config, loss)
            if context.student is not None
        ),
    )
    if choice is not None and all(CAPABILITY_QUERY_LOGPROBS in each.capabilities for each in infos):
        return choice
    why = f"a teacher takes {teachers.max_query_tokens} queried ids a position, or texts are too long, for enough draws of the student"
    return TargetChoice.bucket(loss, why, max_top_k=min(each.max_top_k for each in infos))


def _earlier_choices(
    config: RunConfig, teachers: OnlineTeachers | None, cache: RunCache | None
) -> dict[str, TargetChoice]:
    """Targets, by the path of their loss, of draws without log-probabilities where today's have them: as the run's cache holds
    them, or as an earlier version settled them for this teacher, which their number tells."""
    found = {}
    for path, loss in run_losses(config):
        is_open = loss.draw_logprobs is None and takes_draw_logprobs(loss) and not needs_draw_logprobs(loss)
        if loss.sparse_target != "stratified_tail" or not is_open:
            continue
        stored = None if cache is None else _stored_choice(config, loss, cache, teachers)
        holds = stored is not None and stored.sparse_target == loss.sparse_target
        if not holds and teachers is not None:
            vocab_size = max(each.info.vocab_size for each in teachers.members.values())
            former = replace(loss, draw_logprobs=False)
            stored = (
                _stored_form(former, loss.sparse_target, loss.least_top_k, loss.num_samples or 0)
                if was_settled_without_logprobs(loss, vocab_size)
                else None
            )
        if stored is not None and stored.draw_logprobs is False:
            found[path] = replace(stored, sparse_target_reason=loss.sparse_target_reason)
    return found


def _stored_choice(
    config: RunConfig, loss: LossConfig, cache: RunCache, teachers: OnlineTeachers | None
) -> TargetChoice | None:
    """The target that a cache holds for every teacher of the run; draws before a bucket, None if neither.

    A setting of the user's own is kept: targets with another one do not count.
    """
    models = {each.info.model_fingerprint for each in teachers.members.values()} if teachers else None
    kinds = [
        meta
        for meta in cache.reader.metas
        if not meta.held_out and (models is None or meta.teacher_fingerprint in models)
    ]
    named = [each.name for each in config.teachers if any(meta.name == each.name for meta in kinds)]
    groups = [[meta for meta in kinds if meta.name == name] for name in named] or [kinds]
    for form, draw_logprobs in _stored_forms(loss):
        asked = replace(loss, draw_logprobs=draw_logprobs)
        found = [_stored_kinds(config, asked, group, form) for group in groups]
        common = set.intersection(*map(set, found))
        if common:
            top_k, num_samples = max(common)
            held = f"{num_samples} draws" if num_samples else "no draws"
            if form in TAIL_TARGETS:
                held += " from the tail"
            why = f"the cache {cache.config.path} holds top-{top_k} and {held}"
            return _stored_form(asked, form, top_k, num_samples, why)
    return None


def _stored_forms(loss: LossConfig) -> list[tuple[str, bool | None]]:
    """Forms that a cache may hold for `loss`, the best first, and whether stratified draws come with log-probabilities."""
    usual = takes_draw_logprobs(loss)
    open_choice = loss.draw_logprobs is None and not needs_draw_logprobs(loss)
    stratified = [("stratified_tail", each) for each in ((usual, not usual) if open_choice else (usual,))]
    return [
        *stratified,
        *((form, loss.draw_logprobs) for form in ("sampled_tail", "top_k_and_sampled", "tail_bucket")),
    ]


def _stored_form(loss: LossConfig, form: str, top_k: int, num_samples: int, why: str = "") -> TargetChoice:
    made = TargetChoice.bucket(loss, why)
    return replace(
        made,
        sparse_target=form,
        top_k=top_k,
        num_samples=num_samples or made.num_samples,
        draw_logprobs=loss.draw_logprobs,
    )


def _stored_kinds(
    config: RunConfig, loss: LossConfig, kinds: Sequence[CacheMeta], form: str
) -> list[tuple[int, int]]:
    """Top-k and number of draws of the stored targets that are what the loss would request in this form."""
    if form == "top_k_and_sampled" and not suits_plain_draws(loss):
        return []
    fitting = []
    for meta in kinds:
        num_samples = int((meta.sampling or {}).get("num_sampled_tokens", 0))
        if loss.top_k not in (None, meta.top_k) or loss.num_samples not in (
            None,
            num_samples or loss.num_samples,
        ):
            continue
        settled = settle(loss, _stored_form(loss, form, meta.top_k, num_samples))
        teacher = TeacherConfig(logprob_dtype=meta.logprob_dtype)
        wanted = meta.for_config(training_request(settled, config.data.seed).to_config(teacher))
        if wanted.sampling == meta.sampling and replace(meta, entropy=True).serves(wanted):
            fitting.append((meta.top_k, num_samples))
    return fitting
