"""The run that evaluates a target: a finished run, one of its checkpoints, a model's directory or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stillhouse.client.core.errors import usage_error
from stillhouse.client.trainer.run_handle import RunHandle
from stillhouse.client.trainer.run_lookup import WITHOUT_MODEL
from stillhouse.client.trainer.trainer import Trainer
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec, StudentSpec

_OF_RUN = re.compile(r"(?:runs/)?(latest|[a-z2-7]{1,12})(?:/(final|checkpoints/\d+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A model to evaluate."""

    student: StudentSpec
    name: str
    """As shown to people: a run by its id."""
    run: RunHandle | None = None
    """Run that trained it."""


def find_target(trainer: Trainer, name: str) -> Target:
    """Returns the model that `name` stands for: RUN, RUN/checkpoints/STEP, a directory on the trainer's host, or a hub id.

    Raises StillhouseError: RUN_NOT_FOUND for a part of a run that is not there, INVALID_REQUEST for one that has no model.
    """
    match = _OF_RUN.fullmatch(name)
    if match is None:
        return Target(student=StudentSpec(model=name), name=name)
    try:
        run = trainer.run(match[1], with_model=True)
    except StillhouseError as error:
        if error.reason is not Reason.RUN_NOT_FOUND or match[2] or name == "latest":
            raise
        return Target(student=StudentSpec(model=name), name=name)  # a hub id without a slash
    shown = f"{run.id}/{match[2]}" if match[2] else run.id
    return Target(student=_student_of(run, match[2] or "final"), name=shown, run=run)


def _student_of(run: RunHandle, part: str) -> StudentSpec:
    """Returns the student in `part` of a run: a complete model, or an adapter on its base."""
    files = {each.path for each in run.artifacts()}
    place = f"{run.name}/{part}"
    if f"{part}/config.json" in files:
        return StudentSpec(model=place)
    if f"{part}/adapter_config.json" in files:
        trained = run.get().effective_spec.student
        student = StudentSpec(model=trained.model, adapter=place, quantization=trained.quantization)
        if trained.revision:
            student.revision = trained.revision
        if f"{part}/base/config.json" in files:
            student.model = f"{place}/base"
        return student
    if (task := run.get().spec.task) in WITHOUT_MODEL:
        raise usage_error(f'run {run.id} has no model, as its task is "{task}"; name a run that trains one.')
    steps = sorted({path.split("/")[1] for path in files if path.startswith("checkpoints/")}, key=int)
    known = f"it has checkpoints/{', checkpoints/'.join(steps)}" if steps else "it has no checkpoint yet"
    raise usage_error(f"run {run.id} has no model at {part}; {known}.")


def student_before(trained: StudentSpec) -> StudentSpec:
    """Returns the student that a run began with."""
    student = StudentSpec()
    student.CopyFrom(trained)
    for name in ("lora", "output", "gradient_checkpointing"):
        student.ClearField(name)
    return student


def evaluation_of(target: Target) -> RunSpec:
    """Returns a run that evaluates `target`: with the data, the teachers and the sets of the run that trained it, if one did."""
    spec = RunSpec(task="evaluate", display_name=f"evaluation of {target.name}"[:200])
    spec.student.CopyFrom(target.student)
    if target.run is None:
        return spec
    trained = target.run.get().effective_spec
    if trained.task == "sequence_classification":
        raise usage_error(
            f"run {target.run.id} trained a classifier, which is evaluated in its own run alone: `stillhouse eval {target.run.id} "
            "--report` shows the report; name other rows in evaluation.sets of its run file."
        )
    spec.data.CopyFrom(trained.data)
    spec.teachers.extend(trained.teachers)
    if trained.cache.mode == "only":
        spec.cache.CopyFrom(trained.cache)
    spec.evaluation.CopyFrom(trained.evaluation)
    for field in ("every_steps", "every_epochs", "best_metric", "baseline"):
        spec.evaluation.ClearField(field)
    spec.evaluation.baseline.CopyFrom(student_before(trained.student))
    # A student that began as random numbers had this seed.
    spec.optimizer.seed = trained.optimizer.seed
    spec.labels["of"] = target.run.id
    return spec


def evaluation_of_teacher(target: str, tokenizer: str) -> RunSpec:
    """Returns a run that scores the teacher served at `target`, which has the tokenizer of the model `tokenizer`."""
    spec = RunSpec(task="evaluate", display_name=f"evaluation of {target}"[:200])
    spec.student.model = tokenizer
    spec.teachers.add(targets=target.split(","))
    spec.evaluation.teacher_alone = True
    return spec
