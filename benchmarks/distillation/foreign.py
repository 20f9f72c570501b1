"""Cross-tokenizer distillation: approximate likelihood matching against cross-entropy, through the services.

The teacher has trained on many stories, the students on few; tokenizers are trained separately, with other sizes and
text. Arms of a seed share rows, weights and order. The metric is the held-out cross-entropy of the student's own
tokens, on new stories.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from benchmarks.distillation.report import paired_interval
from examples.demo.__main__ import DemoSize, signals_as_exceptions, teacher_for
from examples.demo.text import sample_habits, stories, write_rows
from stillhouse.client.api import StillhouseError, Trainer
from stillhouse.client.trainer.run_handle import ENDED
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.programs import ProgramError, start_teacher, start_trainer
from tests.support.small_models import make_model, make_tokenizer

WORLD_SEED = 0
TRAIN_ROWS, HELD_OUT_ROWS, EPOCHS = 128, 64, 8
TEACHER_STORIES, TEACHER_STEPS = 6000, 400
STUDENT_VOCABULARY = 300
CROSS_ENTROPY = "cross-entropy"
ARMS: Mapping[str, Mapping[str, Any]] = {
    CROSS_ENTROPY: {"terms": [{"weight": 0}], "hard_weight": 1},
    "chunks alone": {"foreign_tokenizer": "alm", "terms": [{"weight": 100}]},
    "chunks and cross-entropy": {
        "foreign_tokenizer": "alm",
        "terms": [{"weight": 100}],
        "hard_weight": 0.5,
    },
    "chunks that end with words": {
        "foreign_tokenizer": "alm",
        "terms": [{"weight": 100}],
        "hard_weight": 0.5,
        "chunks": "words",
    },
}


def run_spec(
    student: Path, rows: Path, held_out: Path, target: str, loss: Mapping[str, Any]
) -> dict[str, Any]:
    """Builds the run spec of one arm."""
    return {
        "student": {"model": str(student)},
        "teachers": [{"targets": [target]}],
        "data": {
            "train": [{"path": str(rows)}],
            "eval": [{"path": str(held_out)}],
            "max_sequence_tokens": 224,
        },
        "loss": dict(loss),
        "optimizer": {"learning_rate": 5e-3, "micro_batch_size": 16, "epochs": EPOCHS},
        "evaluation": {"metrics": ["perplexity"]},
    }


def losses(client: Trainer, work_dir: Path, target: str, seed: int) -> dict[str, float]:
    """Held-out cross-entropy of each arm's student, in nats per token."""
    world, seeded = sample_habits(WORLD_SEED), work_dir / f"seed-{seed}"
    rows = write_rows(seeded / "rows.jsonl", stories(world, TRAIN_ROWS, 1000 + seed))
    held_out = write_rows(work_dir / "held_out.jsonl", stories(world, HELD_OUT_ROWS, 999))
    tokenizer = make_tokenizer(rows.read_text().splitlines(), seeded / "tokenizer", STUDENT_VOCABULARY)
    student = make_model(
        seeded / "student",
        tokenizer_dir=tokenizer,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        max_sequence_tokens=256,
        seed=seed,
    )
    found = {}
    for arm, loss in ARMS.items():
        handle = client.create_run(run_spec(student, rows, held_out, target, loss))
        run = handle.wait()
        if run.state not in ENDED or run.state != Run.STATE_COMPLETED:
            raise click.ClickException(f"{run.name} ({arm}) failed: {run.error.message}")
        found[arm] = float(handle.metrics("eval/cross_entropy")["eval/cross_entropy"].values[-1])
        click.echo(f"seed {seed}, {arm}: {found[arm]:.4f}", err=True)
    return found


def report(values: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Renders the report as Markdown."""
    yield "| student learns from | held-out cross-entropy | gain over cross-entropy alone |"
    yield "|---|---|---|"
    for arm, found in values.items():
        gain = "" if arm == CROSS_ENTROPY else str(paired_interval(values[CROSS_ENTROPY], found))
        yield f"| {arm} | {sum(found) / len(found):.4f} | {gain} |"


@click.command()
@click.option("--seeds", default=6, show_default=True)
@click.option("--engine", type=click.Choice(["vllm", "hf"]), default="hf", show_default=True)
@click.option(
    "--work-dir", type=click.Path(path_type=Path), required=True, help="Work folder, which keeps the teacher."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for everything as JSON.")
def main(*, seeds: int, engine: str, work_dir: Path, json_file: Path | None) -> None:
    """Train a teacher and students, and report; exit code 1 unless chunks with cross-entropy improve significantly."""
    work_dir = work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    teacher = teacher_for(work_dir, DemoSize(teacher_stories=TEACHER_STORIES, teacher_steps=TEACHER_STEPS))
    try:
        with signals_as_exceptions(), ExitStack() as stack:
            logs = work_dir / "logs"
            options = ["--dtype", "float32", "--threads", "1"]
            served = stack.enter_context(
                start_teacher(teacher, engine=engine, directory=logs, options=options)
            )
            service = stack.enter_context(
                start_trainer(work_dir / "trainer", directory=logs, options=["--stop-runs-on-exit"])
            )
            client = stack.enter_context(Trainer(service.target))
            by_seed = [losses(client, work_dir, served.target, seed) for seed in range(seeds)]
    except (ProgramError, StillhouseError) as error:
        raise click.ClickException(str(error)) from error
    values = {arm: [each[arm] for each in by_seed] for arm in ARMS}
    click.echo("\n".join(report(values)))
    if json_file is not None:
        json_file.write_text(
            json.dumps({"seeds": seeds, "engine": engine, "cross_entropy": values}, indent=2)
        )
    sys.exit(0 if paired_interval(values[CROSS_ENTROPY], values["chunks and cross-entropy"]).low > 0 else 1)


if __name__ == "__main__":
    main()
