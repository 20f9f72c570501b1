"""CPU threads of a process that trains on a CPU: they sleep while they wait, and leave a core to a teacher that computes beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping

from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.telemetry.host_cores import openmp_threads, usable_cores
from stillhouse.student_trainer.config.rules.contexts import rollout_services
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.staleness import max_staleness

PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Environment in which OpenMP's threads (GNU's, and LLVM's or Intel's) sleep between two tasks. By default they spin, which
slows other programs on the same cores, and themselves, several times over."""


def has_teacher_beside(config: RunConfig) -> bool:
    """True if a service on this machine computes while the run trains: a teacher, or one that samples rollouts."""
    return not takes_turns(config) and any(is_loopback(target) for target in _busy_targets(config))


def takes_turns(config: RunConfig) -> bool:
    """True if the run trains on nothing but texts of its own process and its present weights: it waits while a teacher scores them."""
    students = [context.student for context in config.contexts]
    return bool(students) and all(
        student is not None
        and not rollout_services(student)
        and max_staleness(config, student, on_cpu=True) == 0
        for student in students
    )


def yield_cores(config: RunConfig, environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets the threads of this process where the operator, or the run service, has not. Call before torch is imported."""
    wait_passively(environ)
    if environ.get("CUDA_VISIBLE_DEVICES"):
        return
    if openmp_threads(environ) is None:
        environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() - int(has_teacher_beside(config))))


def wait_passively(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets the threads of a process that trains on a CPU sleep while they wait. Call before torch is imported."""
    if environ.get("CUDA_VISIBLE_DEVICES"):
        return
    for name, value in PASSIVE_WAITING.items():
        environ[name] = environ.get(name) or value


def _busy_targets(config: RunConfig) -> Iterator[str]:
    if config.builds_cache or (config.asks_teacher and not config.is_offline):
        for teacher in config.teachers:
            yield from teacher.targets
    for context in config.contexts:
        if context.student is not None:
            yield from (*context.student.rollout_targets, context.student.rollout_target)
