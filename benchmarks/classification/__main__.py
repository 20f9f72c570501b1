"""A small encoder that learns a larger one's classes against one that learns labels alone, through the services.

The teacher is trained here, on many rows. Students have a quarter of its weights and few rows; those of a seed share rows,
first weights and order. Metrics are those that a run reports on fresh rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.classification.languages import Languages, write_rows, write_student, write_teacher
from benchmarks.distillation.report import Interval, paired_interval
from examples.demo.__main__ import signals_as_exceptions
from stillhouse.client.api import StillhouseError, Trainer
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.programs import ProgramError, start_teacher, start_trainer

TEACHER_ROWS, TEACHER_STEPS = 20_000, 1500
TRAIN_ROWS, TEST_ROWS = 1000, 2000
OPTIMIZER = {"learning_rate": 2e-3, "batch_size": 32, "epochs": 12.0}
LABELS, BOTH, TEACHER = "cross-entropy", "teacher and labels", "teacher alone"
LOSSES: Mapping[str, Mapping[str, Any]] = {
    LABELS: {"terms": [{"weight": 0.0}], "hard_weight": 1.0},
    BOTH: {"terms": [{"weight": 0.7}], "hard_weight": 0.3, "temperature": 2.0},
    TEACHER: {"terms": [{"weight": 1.0}], "temperature": 2.0},
}
METRICS = {"accuracy": False, "f1": False, "cross_entropy": True, "ece": True}
"""Metrics, and whether less is better."""
CLAIMED = ("accuracy", "cross_entropy", "ece")
Values = Mapping[str, Mapping[str, Sequence[float]]]
"""Metric of each seed, by arm and name."""


def measure(trainer: Trainer, target: str, languages: Languages, work_dir: Path, *, seeds: int) -> Values:
    """Trains every student, seed by seed, of the teacher that is served at `target` and lies in the work folder."""
    test = write_rows(languages.sample(TEST_ROWS, seed=7), work_dir / "test.jsonl")
    found: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in METRICS} for arm in LOSSES}
    for seed in range(seeds):
        student = write_student(work_dir / "teacher", work_dir / f"student-{seed}", seed)
        train = write_rows(languages.sample(TRAIN_ROWS, seed=100 + seed), work_dir / f"train-{seed}.jsonl")
        for arm, loss in LOSSES.items():
            handle = trainer.create_run(
                {
                    "display_name": f"{arm}, seed {seed}",
                    "task": "sequence_classification",
                    "student": {"model": str(student)},
                    "teachers": [{"targets": [target]}],
                    "data": {
                        "train": [{"path": str(train)}],
                        "eval": [{"path": str(test)}],
                        "max_sequence_tokens": 32,
                        "seed": seed,
                    },
                    "cache": {"path": "caches/classes"},
                    "loss": dict(loss),
                    "optimizer": {**OPTIMIZER, "seed": seed},
                }
            )
            run = handle.wait()
            if run.state != Run.STATE_COMPLETED:
                raise click.ClickException(f"{run.name} ({arm}, seed {seed}) failed: {run.error.message}")
            last = {key: series.values[-1] for key, series in handle.metrics().items()}
            for name in METRICS:
                found[arm][name].append(float(last[f"eval/{name}"]))
            told = ", ".join(f"{name} {found[arm][name][-1]:.4f}" for name in METRICS)
            click.echo(f"{arm}, seed {seed}: {told}", err=True)
    return found


def gains(values: Values, arm: str) -> dict[str, Interval]:
    """Improvement of an arm over labels alone, paired over seeds, by metric: above 0 is better."""
    return {
        name: paired_interval(values[LABELS][name], values[arm][name])
        if less_is_better
        else paired_interval(values[arm][name], values[LABELS][name])
        for name, less_is_better in METRICS.items()
    }


def report(values: Values) -> Iterator[str]:
    """Renders the report as Markdown."""
    yield f"| student | {' | '.join(METRICS)} |"
    yield "|---" * (len(METRICS) + 1) + "|"
    for arm, own in values.items():
        cells = (f"{sum(own[name]) / len(own[name]):.4f}" for name in METRICS)
        yield f"| {arm} | {' | '.join(cells)} |"
    for arm in (BOTH, TEACHER):
        yield f"| gain of {arm} over labels | {' | '.join(map(str, gains(values, arm).values()))} |"


def claims(values: Values) -> dict[str, bool]:
    """Claims on complete 95 % intervals."""
    return {
        f"{arm} improves {name} over labels alone": gains(values, arm)[name].low > 0
        for arm in (BOTH, TEACHER)
        for name in CLAIMED
    }


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=Path(".bench/classification"),
    show_default=True,
    help="Work folder.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for everything as JSON.")
def main(*, seeds: int, work_dir: Path, json_file: Path | None) -> None:
    """Train teacher and students, and report."""
    work_dir = work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    languages = Languages.make()
    teacher = write_teacher(languages, work_dir / "teacher", num_rows=TEACHER_ROWS, steps=TEACHER_STEPS)
    best = languages.best_accuracy(languages.sample(TEST_ROWS, seed=7))
    try:
        with signals_as_exceptions(), ExitStack() as stack:
            logs = work_dir / "logs"
            served = stack.enter_context(
                start_teacher(teacher, engine="hf", directory=logs, options=["--threads", "1"])
            )
            service = stack.enter_context(
                start_trainer(
                    work_dir / "trainer",
                    directory=logs,
                    options=["--allow-root", str(work_dir), "--stop-runs-on-exit", "--stop-grace-s", "5"],
                )
            )
            trainer = stack.enter_context(Trainer(service.target))
            values = measure(trainer, served.target, languages, work_dir, seeds=seeds)
    except (ProgramError, StillhouseError) as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(report(values)))
    click.echo(f"\nAccuracy of who knows the languages: {best:.4f}\n")
    found = claims(values)
    for name, holds in found.items():
        click.echo(f"- {'pass' if holds else 'FAIL'}: {name}")
    if json_file is not None:
        json_file.write_text(
            json.dumps({"values": values, "best_accuracy": best, "claims": found}, indent=2) + "\n"
        )
    sys.exit(0 if all(found.values()) else 1)


if __name__ == "__main__":
    main()
