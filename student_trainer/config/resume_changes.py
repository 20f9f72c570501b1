"""Changes to the settings of a run that is resumed: passes, checkpoints, retries, devices, and nothing that changes what is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from stillhouse.protos.errors import FieldViolation
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.checks import invalid_field, invalid_spec
from stillhouse.student_trainer.config.proto import from_proto, read, to_proto
from stillhouse.student_trainer.config.schema import OptimizerConfig, RunConfig

CHANGEABLE = (
    "optimizer.micro_batch_tokens",
    "optimizer.micro_batch_size",
    "optimizer.grad_accum_steps",
    "student.gradient_checkpointing",
    "checkpoint",
    "retry",
    "resources",
)
"""Fields, and sections, that a resumed run may change."""
_INSTEAD: Mapping[str, tuple[str, ...]] = {
    "gpus": ("gpu_count", "num_processes"),
    "gpu_count": ("gpus", "num_processes"),
}
"""Settings of devices that another one replaces."""


def changed_spec(effective: RunSpec, changes: RunSpec) -> RunSpec:
    """The effective spec `effective` with the fields that `changes` sets; an update keeps its number of rows.

    Raises:
        StillhouseError: INVALID_SPEC with every field that may not change, or whose value cannot be.
    """
    paths = list(_paths(changes))
    if "optimizer" in paths:
        # A client leaves this of "micro_batch_tokens: auto", as it does in the file of a new run.
        raise invalid_field(
            "optimizer.micro_batch_tokens",
            "has no number; auto is found when a run begins. Give tokens of a pass, such as 2048, or leave it out.",
        )
    forbidden = [path for path in paths if not _may_change(path)]
    if forbidden:
        rule = f"is not changed by a resume; leave it out, or create a new run. A resume changes {', '.join(CHANGEABLE)}."
        raise invalid_spec([FieldViolation(path, rule) for path in forbidden])
    spec = RunSpec()
    spec.CopyFrom(effective)
    devices: Message = spec.resources
    for name, others in _INSTEAD.items():
        if f"resources.{name}" in paths:
            for other in others:
                devices.ClearField(other)
    _merge(spec, changes)
    _set_passes(spec, read(RunConfig, effective).optimizer, changes)
    return to_proto(from_proto(spec))


def with_changeable(kept: RunSpec, stored: RunSpec) -> RunSpec:
    """The effective spec `kept` of a run directory, with all that a resume may change as `stored` has it.

    Everything else stays, such as paths that were edited after the directory had moved.
    """
    spec = RunSpec()
    spec.CopyFrom(kept)
    for path in (*CHANGEABLE, "optimizer.batch_size"):
        *parents, name = path.split(".")
        target: Any = spec
        source: Any = stored
        for parent in parents:
            target, source = getattr(target, parent), getattr(source, parent)
        target.ClearField(name)
        if not source.HasField(name):
            continue
        value = getattr(source, name)
        if isinstance(value, Message):
            getattr(target, name).CopyFrom(value)
        else:
            setattr(target, name, value)
    return spec


def changes_passes(changes: RunSpec) -> bool:
    """True if `changes` says how an update is cut into passes."""
    return any(path.startswith("optimizer.") for path in _paths(changes))


def _may_change(path: str) -> bool:
    return any(path == each or path.startswith(f"{each}.") for each in CHANGEABLE)


def _paths(message: Message, above: str = "") -> Iterator[str]:
    """Paths of the fields that are set: those of values, of lists, and of messages without a value."""
    for field, value in message.ListFields():
        path = f"{above}.{field.name}" if above else field.name
        is_message = field.message_type is not None and not field.is_repeated
        below = list(_paths(value, path)) if is_message else []
        yield from below or [path]


def _merge(into: Message, changes: Message) -> None:
    """Sets the fields of `changes` in `into`; a list replaces the former one."""
    for field, value in changes.ListFields():
        if field.is_repeated:
            into.ClearField(field.name)
            getattr(into, field.name).extend(value)
        elif field.message_type is not None:
            _merge(getattr(into, field.name), value)
        else:
            setattr(into, field.name, value)


def _set_passes(spec: RunSpec, before: OptimizerConfig, changes: RunSpec) -> None:
    """Completes a change of the passes so that an update has as many rows as `before`."""
    asked: Message = changes.optimizer
    after: Any = spec.optimizer
    rows = before.rows_per_update
    names = ("micro_batch_size", "grad_accum_steps")
    given = [name for name in names if asked.HasField(name)]
    by_tokens = asked.HasField("micro_batch_tokens")
    if given and (by_tokens or not before.cuts_by_rows):
        why = "is for passes that are cut by rows, and those of this run are cut by tokens"
        raise invalid_field(f"optimizer.{given[0]}", f"{why}; give optimizer.micro_batch_tokens alone.")
    if by_tokens and before.cuts_by_rows:
        for name in names:
            after.ClearField(name)
        after.batch_size = rows
    if len(given) == 1:
        value = getattr(after, given[0])
        if value > 0 and rows % value == 0:
            other = names[1 - names.index(given[0])]
            setattr(after, other, rows // value)
    if given and after.micro_batch_size * after.grad_accum_steps != rows:
        divisors = ", ".join(str(each) for each in range(1, rows + 1) if rows % each == 0)
        raise invalid_field(
            f"optimizer.{given[0]}",
            f"{getattr(after, given[0])} does not keep the {rows} rows of an update, micro_batch_size x grad_accum_steps; "
            f"give one of {divisors}, and leave the other one out.",
        )
