"""Checks the trackers of a run: each kind once, and no field that its kind has no use for."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.errors import FieldViolation
from stillhouse.student_trainer.config.resources import TrackerConfig
from stillhouse.student_trainer.config.schema import RunConfig

WITH_ENTITY = ("wandb", "swanlab")
"""Kinds whose projects belong to a team or workspace."""


def check_trackers(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `trackers`."""
    seen = set()
    for index, tracker in enumerate(config.trackers):
        path = f"trackers[{index}]"
        if tracker.kind in seen:
            yield FieldViolation(f"{path}.kind", f'"{tracker.kind}" is there twice; name each tracker once.')
        seen.add(tracker.kind)
        yield from _check_fields(path, tracker)


def _check_fields(path: str, tracker: TrackerConfig) -> Iterator[FieldViolation]:
    if tracker.entity and tracker.kind not in WITH_ENTITY:
        owners = " and ".join(WITH_ENTITY)
        yield FieldViolation(f"{path}.entity", f"is for {owners} alone; leave it out.")
    if tracker.kind != "tensorboard":
        return
    for name in ("uri", "credential"):
        if getattr(tracker, name):
            yield FieldViolation(
                f"{path}.{name}", "is for trackers with a server; tensorboard writes files. Leave it out."
            )
