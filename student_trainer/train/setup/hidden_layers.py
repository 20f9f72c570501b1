"""Settles the layers whose hidden states are compared, once teacher and student are known by their sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import structlog

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError, first_line
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoResponse
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.rules.contexts import run_losses
from stillhouse.student_trainer.config.schema import RunConfig, StudentConfig
from stillhouse.student_trainer.config.settled.layer_pairs import (
    EVEN,
    LAST,
    LayerChoice,
    check_depths,
    settle_layers,
    settle_spec_layers,
    teacher_layers,
    unsettled_layers,
)
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import PROJECTIONS, facts_of
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.student.loading import model_not_found, model_source
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers

log = structlog.get_logger()

RULE_FACT = "hidden_layers"
"""Fact of a checkpoint: EVEN or LAST, the rule by which layers that no run file names were found; empty if there are none."""


def settle_hidden_layers(
    scope: RunScope, config: RunConfig, teachers: OnlineTeachers, corpus: Corpus
) -> RunConfig:
    """The configuration whose losses name the layers that they compare, by the sizes of teacher and student.

    Writes the layers that no run file names to the run directory and reports them. All processes call this together. Raises
    StillhouseError: INVALID_SPEC for layers that a model does not have, CAPABILITY for teachers whose sizes differ.
    """
    if not any(loss.compares_hidden for _, loss in run_losses(config)):
        return config
    info = _common_info(teachers)
    sizes = {"teacher_layers": info.num_layers, "student_layers": student_depth(config.student, scope)}
    rule: str = scope.ranks.exchange(
        kept_rule(scope.run_dir) if scope.ranks.is_first else None, patient=True
    )[0]
    choices = {path: LayerChoice.by(rule, **sizes) for path in unsettled_layers(config)}
    config = settle_layers(config, choices)
    problems = list(_problems(config, sizes))
    if problems:
        raise invalid_field(problems[0].field, problems[0].description)
    if choices and scope.attempt.writes:
        # Reported first: what is in the file is not decided, nor reported, again.
        scope.attempt.report("settled", layers={path: each.to_json() for path, each in choices.items()})
        effective = scope.run_dir.effective_spec()
        settle_spec_layers(effective, choices)
        scope.run_dir.write_effective_spec(effective)
    for path, loss in run_losses(config):
        if loss.hidden_mse is not None and loss.compares_hidden:
            pairs = [f"{each.student} with {each.teacher}" for each in loss.hidden_mse.layers]
            log.info(
                "layers of the student compared with layers of the teacher",
                loss=path,
                layers=pairs,
                why=loss.hidden_mse.layers_reason or "the run file says so",
            )
    _warn_of_bytes(config, info, teachers, corpus, scope.ranks.size)
    return config


def kept_rule(run_dir: RunDir) -> str:
    """The rule by which the checkpoints of a run compare layers that its file does not name; EVEN without a checkpoint.

    Those of earlier versions do not say it. Without projections they may compare the last layers alone.
    """
    for step in reversed(run_dir.checkpoints()):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            told = facts_of(run_dir, step).get(RULE_FACT)
            has_projections = (run_dir.checkpoint_path(step) / PROJECTIONS).exists()
            return (EVEN if has_projections else LAST) if told is None else told or EVEN
    return EVEN


def recorded_rule(config: RunConfig, run_dir: RunDir) -> str:
    """The value of RULE_FACT for checkpoints of a settled configuration; empty if the run file decides all layers."""
    settled = any(loss.hidden_mse and loss.hidden_mse.layers_reason for _, loss in run_losses(config))
    return kept_rule(run_dir) if settled else ""


def student_depth(config: StudentConfig, scope: RunScope) -> int:
    """Layers of the student, by its configuration. Raises StillhouseError(MODEL_NOT_FOUND)."""
    from transformers import AutoConfig

    if config.keep_layers:
        return len(config.keep_layers)
    source = model_source(config, scope.data_dir)

    def refused(error: BaseException) -> StillhouseError:
        return model_not_found(
            config, source, f"has no number of layers that can be read ({first_line(error)})"
        )

    with reported_as(refused):
        found = AutoConfig.from_pretrained(source, revision=config.revision or None, trust_remote_code=False)
        return int(found.get_text_config().num_hidden_layers)


def _common_info(teachers: OnlineTeachers) -> GetTeacherInfoResponse:
    infos = {name: each.info for name, each in teachers.members.items()}
    sizes = {(each.num_layers, each.hidden_size) for each in infos.values()}
    if len(sizes) > 1:
        told = ", ".join(
            f"{name} has {each.num_layers} layers of {each.hidden_size} units" for name, each in infos.items()
        )
        raise StillhouseError(
            Reason.CAPABILITY,
            f"loss.hidden_mse compares with teachers of one size, and {told}. Name teachers of one model, or leave it out.",
        )
    return next(iter(infos.values()))


def _problems(config: RunConfig, sizes: dict[str, int]) -> Iterator[FieldViolation]:
    for path, loss in run_losses(config):
        if loss.hidden_mse is not None and loss.compares_hidden:
            yield from check_depths(f"{path}.hidden_mse", loss.hidden_mse, **sizes)


def _warn_of_bytes(
    config: RunConfig, info: GetTeacherInfoResponse, teachers: OnlineTeachers, corpus: Corpus, num_ranks: int
) -> None:
    """Logs a warning if the states of all steps that are requested ahead may not fit into the free memory."""
    layers = max(len(teacher_layers(loss)) for _, loss in run_losses(config))
    rows = config.optimizer.rows_per_update / num_ranks * (1 + teachers.prefetch_steps)
    most = rows * len(corpus.longest.token_ids) * layers * info.hidden_size * 4
    free = psutil.virtual_memory().available
    if most > free / 2:
        log.warning(
            "hidden states of the steps that are requested ahead may fill the memory",
            at_most_bytes=int(most),
            free_bytes=free,
            remedy="name fewer pairs in loss.hidden_mse.layers, or lower teachers[].prefetch_steps or optimizer.batch_size",
        )
