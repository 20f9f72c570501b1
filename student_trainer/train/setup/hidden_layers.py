"""Settles the layers whose hidden states are compared, once teacher and student are known by their sizes."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import structlog

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError, first_line
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoResponse
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.rules.contexts import run_losses
from stillhouse.student_trainer.config.schema import RunConfig, StudentConfig
from stillhouse.student_trainer.config.settled.layer_pairs import check_depths, settle_layers, teacher_layers
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.student.loading import model_not_found, model_source
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers

log = structlog.get_logger()


def settle_hidden_layers(
    scope: RunScope, config: RunConfig, teachers: OnlineTeachers, corpus: Corpus
) -> RunConfig:
    """The configuration whose losses name the layers that they compare, by the sizes of teacher and student.

    They follow from the models alone, so that a resume finds the same. Raises StillhouseError: INVALID_SPEC for layers that a
    model does not have, CAPABILITY for teachers whose sizes differ.
    """
    if not any(loss.compares_hidden for _, loss in run_losses(config)):
        return config
    info = _common_info(teachers)
    sizes = {"teacher_layers": info.num_layers, "student_layers": student_depth(config.student, scope)}
    config = settle_layers(config, **sizes)
    problems = list(_problems(config, sizes))
    if problems:
        raise invalid_field(problems[0].field, problems[0].description)
    for path, loss in run_losses(config):
        if loss.hidden_mse is not None and loss.compares_hidden:
            pairs = [f"{each.student} with {each.teacher}" for each in loss.hidden_mse.layers]
            log.info("layers of the student compared with layers of the teacher", loss=path, layers=pairs)
    _warn_of_bytes(config, info, teachers, corpus, scope.ranks.size)
    return config


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
