"""Prometheus metrics of live runs."""

from __future__ import annotations

from pathlib import Path

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint
from stillhouse.student_trainer.runs import metrics as figures
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceSlots
from tests.student_trainer.runs.store.store_contract import batch, new_run

LIVE, QUEUED = "a" * 12, "b" * 12


def test_live_runs_show_their_latest_metrics(tmp_path: Path) -> None:
    store, db = Store.open(tmp_path / "stillhouse.db"), DatabaseThread()
    for run_id in (LIVE, QUEUED):
        new_run(store, run_id)
    store.begin_attempt(LIVE, ())
    steps = [
        {"teacher/breaks": 1.0, "cache/found": 3.0},
        {"teacher/breaks": 2.0, "device/memory_bytes": 5e9, "train/loss": 1.0},
        {"eval/kl": 0.5},
    ]
    points = [(1, MetricPoint(step=step, values=values, attempt=1)) for step, values in enumerate(steps)]
    store.record(LIVE, batch(10, *points))
    show = figures.RunMetrics(store, db, DeviceSlots(gpus=(), cpu_slots=1))
    shown = {each.name: (each.value, each.labels) for each in show() if "run" in each.labels}
    db.close()
    store.close()
    assert shown == {
        "run_teacher_breaks": (2.0, {"run": LIVE}),
        "run_cache_hits": (3.0, {"run": LIVE}),
        "run_device_memory_bytes": (5e9, {"run": LIVE}),
    }
