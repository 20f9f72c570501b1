"""Two programs on the same cores, as README starts them: a run beside a teacher that answers on loopback.

Steps of a training process as it sets itself up, against one that computes on every core and spins while it waits, as
OpenMP does by default. Both query one teacher service; processes of both kinds alternate, and adjacent ones form a pair.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from benchmarks.overlap.student import LENGTH, ROWS, make_models, write_rows
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.run_dir import RunDir
from tests.support.programs import start_teacher

KINDS = ("by itself", "spinning")
TEACHER_LAYERS = 2
BATCH = 16
LEAD_IN_STEPS = 3
OPENMP_SPINS = "300000"
"""Rounds for which GNU's OpenMP spins where no variable says otherwise: about 3 ms."""


def step_times(
    directory: Path, engine: str, *, pairs: int, steps: int, console: Console
) -> dict[str, list[float]]:
    """Median seconds of a step in each process, by kind."""
    models = make_models(directory / "models", TEACHER_LAYERS)
    data = write_rows(directory / "rows.jsonl", 4 * ROWS, LENGTH)
    teacher = start_teacher(models.teacher, engine=engine, directory=directory)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with teacher:
        for pair in range(pairs):
            for kind in KINDS if pair % 2 else reversed(KINDS):
                run_dir = _run_dir(directory / f"{pair}-{kind}", models.student, data, teacher.target, steps)
                seconds = _median_step(run_dir, _environment(kind))
                console.print(f"pair {pair + 1}, {kind}: {seconds:.3f} s a step", soft_wrap=True)
                times[kind].append(seconds)
    return times


def _environment(kind: str) -> Mapping[str, str]:
    """This process's environment without its threads; for the spinning kind as OpenMP would have it."""
    ours = ("OMP_", "KMP_", "MKL_", "GOMP_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    if kind == "spinning":
        threads = str(len(os.sched_getaffinity(0)))
        plain |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "GOMP_SPINCOUNT": OPENMP_SPINS}
    return plain


def _run_dir(path: Path, student: Path, data: Path, target: str, steps: int) -> RunDir:
    spec = RunSpec()
    spec.student.model = str(student)
    spec.teachers.add(targets=[target])
    spec.data.train.add(path=str(data))
    spec.data.max_sequence_tokens = LENGTH
    spec.data.eval_fraction = 0.0
    spec.optimizer.max_steps = steps + LEAD_IN_STEPS
    spec.optimizer.micro_batch_size = BATCH
    spec.checkpoint.every_steps = steps + LEAD_IN_STEPS
    run_dir = RunDir.create(path, spec, to_proto(from_proto(spec)))
    run_dir.write_control(1, stop=False)
    return run_dir


def _median_step(run_dir: RunDir, environment: Mapping[str, str]) -> float:
    """Trains, and returns the median time of the steps after the first ones."""
    command = [sys.executable, "-m", "stillhouse.student_trainer.train", str(run_dir.path), "--attempt", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the training process ended with {done.returncode}: {done.stderr[-2000:]}")
    values = [json.loads(line)["values"] for line in run_dir.metrics_path.read_text().splitlines()]
    times: list[float] = [each["train/step_time_s"] for each in values if "train/step_time_s" in each]
    return statistics.median(times[LEAD_IN_STEPS:])
