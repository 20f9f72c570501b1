"""What a run's cache must satisfy together with its task, its contexts and its teachers."""

from __future__ import annotations

from collections.abc import Iterator

from protos.errors import FieldViolation
from student_trainer.config import RunConfig


def check_cache(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `cache`, and of a run whose task is to build one."""
    if config.task == "cache":
        yield from _check_build(config)
    if config.cache is None:
        return
    if not config.cache.path:
        yield FieldViolation("cache.path", 'is required, such as "caches/my-set".')
    if config.cache.mode == "only":
        for i, context in enumerate(config.contexts):
            if context.dataset is None:
                yield FieldViolation(
                    f"contexts[{i}]",
                    "is text that is written during the run, and cache.mode: only asks nobody. Build a cache of the teacher's "
                    "texts with this context, then learn from data.train: [{path: caches/...}], which holds them.",
                )


def _check_build(config: RunConfig) -> Iterator[FieldViolation]:
    if config.cache is None:
        yield FieldViolation(
            "cache", 'is required with task: cache; name a place, such as {path: "caches/my-set"}.'
        )
    elif config.cache.mode != "write_through":
        yield FieldViolation("cache.mode", f'is "{config.cache.mode}", which keeps nothing; leave it out.')
    if not config.teachers:
        yield FieldViolation("teachers", "is empty, and task: cache asks one; name it.")
    for i, context in enumerate(config.contexts):
        if context.student is not None:
            yield FieldViolation(
                f"contexts[{i}]",
                "is text of a student that changes as it learns, which task: cache cannot keep; leave it out.",
            )
