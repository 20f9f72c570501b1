"""A run service's history to measure pages on: many ended runs, and one with very many metric points."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError, to_status
from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint
from stillhouse.student_trainer.config import proto
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.store import run_state
from stillhouse.student_trainer.runs.store.journal_ingest import JournalBatch
from stillhouse.student_trainer.runs.store.store import Store
from tests.student_trainer.config.specs import SMALLEST, spec_of

POINTS_AT_ONCE = 2000
TEAMS = ("ada", "ben", "cy", "dot")
OTHERS = ("forward_kl", "cross_entropy", "learning_rate", "grad_norm", "tokens_per_second", "teacher_wait_s")
"""Metrics of each point beside the loss."""


def fill(data: Path, runs: int, points: int, points_of_others: int) -> None:
    """Makes a data directory whose newest run has `points` points."""
    folder = DataDir.open(data)
    store = Store.open(folder.database_path)
    generator = random.Random(0)
    for number in range(runs):
        is_last = number == runs - 1
        _add_run(store, id_of(number), number, points if is_last else points_of_others, generator)
    store.close()
    folder.close()


def id_of(number: int) -> str:
    """Id of the run of this number, from 0."""
    return f"{_letters(number):a>12}"


def _add_run(store: Store, name: str, number: int, points: int, generator: random.Random) -> None:
    labels = {"team": TEAMS[number % len(TEAMS)], "sweep": str(number // 50)}
    rate = 10 ** generator.uniform(-4, -2)
    spec = spec_of(
        {
            **SMALLEST,
            "display_name": f"sweep {number // 50}, rate {rate:.2e}",
            "labels": labels,
            "optimizer": {"learning_rate": rate, "max_steps": points},
        }
    )
    store.create(name, spec, proto.to_proto(proto.with_defaults(spec)), request_id="", version="0.2.0")
    store.begin_attempt(name, ())
    started = {"started": True, "changes": {"total_steps": points}}
    store.record(name, JournalBatch(offsets={}, **started))  # type: ignore[arg-type]
    batch: list[tuple[int, MetricPoint]] = []
    for point in _points(points, generator):
        batch.append((1, point))
        if len(batch) == POINTS_AT_ONCE or point.step == points:
            progress = {"step": point.step, "trained_tokens": 500 * point.step}
            store.record(name, JournalBatch(offsets={}, metrics=batch, progress=progress))
            batch = []
    failed = number % 20 == 7
    error = to_status(StillhouseError(Reason.SERVICE_UNREACHABLE, "No teacher answered.")) if failed else None
    following = run_state.FAILED if failed else run_state.COMPLETED
    store.end_attempt(name, 1, following, exit_code=int(failed), signal=0, error=error)


def _points(count: int, generator: random.Random) -> Iterator[MetricPoint]:
    """A falling curve with noise, and now and then a spike; every hundredth step is evaluated in the same point."""
    for step in range(1, count + 1):
        loss = 1 + 4 * math.exp(-8 * step / count) + generator.gauss(0, 0.1)
        values = {"train/loss": loss + 20 * (generator.random() < 1e-4)}
        values |= {f"train/{name}": generator.random() for name in OTHERS}
        if step % 100 == 0:
            values |= {"eval/kl": loss / 4, "eval/cross_entropy": loss}
        yield MetricPoint(step=step, values=values, attempt=1)


def _letters(number: int) -> str:
    """A number in the alphabet of run ids."""
    digits = "abcdefghijklmnopqrstuvwxyz234567"
    return (_letters(number // 32) if number >= 32 else "") + digits[number % 32]
