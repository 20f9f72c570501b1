"""Caches that runs of a trainer name, with the run that built each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stillhouse.client.trainer.run_lookup import CACHE_TASKS
from stillhouse.protos.stillhouse.v1.run_pb2 import Run

SUMMARY = "exports/cache.json"
"""Artifact that a build leaves, with the contents of the cache; student_trainer/train/cache_build/build.py writes it."""


@dataclass(kw_only=True, slots=True)
class NamedCache:
    """A cache, by the path that run files give it."""

    path: str
    last_run: Run
    """The newest run that names it."""
    num_runs: int = 0
    build: Run | None = None
    """The newest run that built it; None if runs wrote through it alone."""

    @property
    def use(self) -> str:
        """Use of it by its last run: "build", else the run's cache.mode."""
        spec = self.last_run.effective_spec
        return "build" if spec.task in CACHE_TASKS else spec.cache.mode


def caches_of(runs: Iterable[Run]) -> list[NamedCache]:
    """The caches that `runs`, newest first, name; most recently used first."""
    found: dict[str, NamedCache] = {}
    for run in runs:
        path = run.spec.cache.path
        if not path:
            continue
        cache = found.setdefault(path, NamedCache(path=path, last_run=run))
        cache.num_runs += 1
        if cache.build is None and run.effective_spec.task in CACHE_TASKS:
            cache.build = run
    return list(found.values())
