"""Settles the age that rollouts may have, where the run file leaves it out: by what computes beside the training process.

Older texts are a loss of quality, which is worth it where the time of an update falls: where the next texts are written, or
scored, on other processors while the student trains. On the cores of one machine they only take turns.
"""

from __future__ import annotations

from dataclasses import replace

from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.student_trainer.config.rules.contexts import rollout_services
from stillhouse.student_trainer.config.schema import ContextConfig, RunConfig, StudentContextConfig


def max_staleness(config: RunConfig, context: StudentContextConfig, *, on_cpu: bool) -> int:
    """The most updates that a rollout of `context` may be old: as set, else 0 or 1; `on_cpu` if the run trains on a CPU."""
    if context.max_staleness is not None:
        return context.max_staleness
    if rollout_services(context):
        return 1
    teachers = [target for teacher in config.teachers for target in teacher.targets]
    return 0 if on_cpu and any(map(is_loopback, teachers)) else 1


def settle_staleness(config: RunConfig, *, on_cpu: bool) -> RunConfig:
    """`config` with the staleness of every context of rollouts."""
    return replace(config, contexts=tuple(_settled(config, each, on_cpu=on_cpu) for each in config.contexts))


def _settled(config: RunConfig, context: ContextConfig, *, on_cpu: bool) -> ContextConfig:
    if context.student is None:
        return context
    age = max_staleness(config, context.student, on_cpu=on_cpu)
    return replace(context, student=replace(context.student, max_staleness=age))
