"""`make demo`: distils a small teacher into a smaller student with all three programs and compares it with plain training.

Every number of the final table is a metric that a run reported. All processes that it starts end with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.demo.comparison import (
    METHODS,
    Method,
    Recipe,
    RunFailedError,
    RunScores,
    Scores,
    best_learning_rate,
    complete,
    run_spec,
)
from examples.demo.text import sample_habits, stories, write_rows
from stillhouse.client.api import StillhouseError, Trainer
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.programs import SHARED_CORES, ProgramError, start_teacher, start_trainer

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
WORLD_SEED, TEACHER_SEED, TRAIN_SEED, HELD_OUT_SEED = 7, 1, 2, 3
console = Console(highlight=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSize:
    """Sizes of the demo; the defaults take some minutes on two cores."""

    teacher_stories: int = 20_000
    teacher_steps: int = 700
    student_stories: int = 128
    held_out_stories: int = 128
    student_steps: int = 300
    batch_size: int = 16


def demo(work_dir: Path, engine: str, size: DemoSize, *, stay: bool) -> None:
    """Creates text and models, trains the students side by side, prints the table; with `stay` the page stays up until a
    signal comes."""
    world = sample_habits(WORLD_SEED)
    data = work_dir / "data"
    train = write_rows(data / "train.jsonl", stories(world, size.student_stories, TRAIN_SEED))
    held_out = write_rows(data / "held_out.jsonl", stories(world, size.held_out_stories, HELD_OUT_SEED))
    heading("1  A teacher and a student")
    teacher_dir = teacher_for(work_dir, size)
    student_dir = student_for(teacher_dir, work_dir)
    recipe = Recipe(
        train=train,
        held_out=held_out,
        held_out_rows=size.held_out_stories,
        steps=size.student_steps,
        batch_size=size.batch_size,
        max_sequence_tokens=256,
    )
    heading("2  The services")
    data_dir, log_dir = work_dir / "trainer", work_dir / "logs"
    shutil.rmtree(data_dir, ignore_errors=True)
    started = time.monotonic()
    with (
        start_teacher(
            teacher_dir, engine=engine, directory=log_dir, options=["--dtype", "float32"]
        ) as teacher,
        start_trainer(
            data_dir,
            directory=log_dir,
            options=[
                *("--cpu-slots", "2", "--stop-runs-on-exit", "--stop-grace-s", "5"),
                *("--web", "--web-listen", "127.0.0.1:0"),
            ],
            environment={"STILLHOUSE_TEACHER": teacher.target},
        ) as trainer,
        Trainer(trainer.target) as client,
    ):
        console.print(
            f"stillhouse-teacher ({engine}) at {teacher.target}, stillhouse-trainer at {trainer.target}, "
            f"after {time.monotonic() - started:.0f} s. Their logs: {log_dir}"
        )
        page = (data_dir / "web.address").read_text().strip()
        console.print(f"The runs in a browser: {page}")
        heading(f"3  Six runs of {size.student_steps} steps, two at a time")
        results = train_students(client, recipe, student_dir, teacher.target)
        heading("4  The results")
        show_results(results, size)
        (work_dir / "result.json").write_text(json.dumps(as_json(results), indent=2))
        if stay:
            console.print(f"The services and their page stay up: {page}\nCtrl-C ends them.")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    signal.pause()


def heading(text: str) -> None:
    """Prints a rule with a title."""
    console.rule(f"[bold]{text}", align="left")


def teacher_for(work_dir: Path, size: DemoSize) -> Path:
    """Returns the directory of a trained teacher; reuses one of equal settings from an earlier demo."""
    from tests.support.train_teacher import TeacherRecipe, train_teacher

    recipe = TeacherRecipe(
        vocab_size=512,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        steps=size.teacher_steps,
        sequence_tokens=128,
        max_sequence_tokens=256,
        held_out_fraction=0.01,
    )
    rows = stories(sample_habits(WORLD_SEED), size.teacher_stories, TEACHER_SEED)
    documents = [row["prompt"] + row["completion"] for row in rows]
    settings = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    digest = hashlib.sha256("\n".join([settings, *documents]).encode()).hexdigest()[:12]
    directory, trained = work_dir / f"teacher-{digest}", work_dir / f"teacher-{digest}" / "trained.json"
    if trained.exists():
        console.print(f"teacher: reusing the one in {directory}; --fresh trains another")
        return directory
    started = time.monotonic()
    train_teacher(documents, directory, recipe, report=console.print)
    trained.write_text(settings)
    console.print(f"teacher: trained in {time.monotonic() - started:.0f} s, saved in {directory}")
    return directory


def student_for(teacher_dir: Path, work_dir: Path) -> Path:
    """Creates a student with random weights and the teacher's tokenizer, from which every run starts; returns its directory."""
    from tests.support.small_models import make_student

    directory = make_student(
        teacher_dir, work_dir / "student", hidden_size=64, num_layers=2, num_heads=2, seed=0
    )
    size = (directory / "model.safetensors").stat().st_size / (
        teacher_dir / "model.safetensors"
    ).stat().st_size
    console.print(f"student: {size:.0%} of the teacher's size, random weights, in {directory}")
    return directory


def train_students(
    client: Trainer, recipe: Recipe, student_dir: Path, teacher: str
) -> dict[Method, dict[float, RunScores]]:
    """Trains all students and returns the completed runs, by method and learning rate."""
    grid = [(method, rate) for rate in LEARNING_RATES for method in METHODS]
    specs = [
        run_spec(
            recipe,
            student=student_dir,
            teacher=teacher,
            method=method,
            learning_rate=rate,
            seed=0,
            display_name=f"{method}, learning rate {rate:g}",
        )
        for method, rate in grid
    ]
    results: dict[Method, dict[float, RunScores]] = {method: {} for method in METHODS}
    with RunBars() as bars, closing(complete(client, specs, report=bars.show)) as completed:
        for index, result in completed:
            method, rate = grid[index]
            results[method][rate] = result
    return results


class RunBars(Progress):
    """A progress bar for each run."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description:36}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TextColumn("{task.fields[state]:9}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}

    def show(self, run: Run) -> None:
        """Updates the run's bar."""
        steps = run.effective_spec.optimizer.max_steps
        bar = self._bars.get(run.name)
        if bar is None:
            bar = self.add_task(run.spec.display_name, total=steps, start=False, state="")
            self._bars[run.name] = bar
        state = Run.State.Name(run.state).removeprefix("STATE_").lower()
        if state != "pending" and not self.tasks[bar].started:
            self.start_task(bar)
        completed = steps if run.state == Run.STATE_COMPLETED else run.progress.step
        self.update(bar, completed=completed, state=state)


def show_results(results: dict[Method, dict[float, RunScores]], size: DemoSize) -> None:
    """Prints the table, its conditions, and the next steps."""
    best = {method: results[method][best_learning_rate(results[method])] for method in METHODS}
    table = Table(title=f"Students on {size.held_out_stories} held-out stories")
    table.add_column("student", no_wrap=True)
    for column in ("KL to teacher", "perplexity", "agreement", "rate"):
        table.add_column(column, justify="right")
    table.add_column("run", no_wrap=True)
    table.add_row("untrained", *cells(best["distilled"].before), "", "")
    for method in METHODS:
        rate = best_learning_rate(results[method])
        table.add_row(
            method, *cells(best[method].after), f"{rate:g}", best[method].name.removeprefix("runs/")
        )
    console.print(table)
    console.print(
        f"Both students started from the same weights and saw the same {size.student_stories} stories in the same order "
        f"for {size.student_steps} steps. For each, the learning rate is the one of "
        f"{', '.join(f'{rate:g}' for rate in LEARNING_RATES)} with the lowest perplexity on these held-out stories."
    )
    plain, distilled = best["cross-entropy"].after, best["distilled"].after
    if distilled.perplexity < plain.perplexity and distilled.kl < plain.kl:
        console.print("[green]The distilled student is ahead in perplexity and in KL to the teacher.")
    else:
        console.print("[yellow]The distilled student is not ahead this time.")
    heading("Next: your own models")
    console.print(
        "  .venv/bin/stillhouse-teacher --model Qwen/Qwen2.5-7B-Instruct      # on the teacher's host\n"
        "  .venv/bin/stillhouse-trainer --data-dir ~/stillhouse               # on the student's host\n"
        "  .venv/bin/stillhouse run create examples/runs/quickstart.yaml --watch   # name your student, data and teacher in it",
        soft_wrap=True,
    )


def cells(scores: Scores) -> tuple[str, str, str]:
    """Formats a row's numbers."""
    return f"{scores.kl:.4f}", f"{scores.perplexity:.3f}", f"{scores.agreement:.1%}"


def as_json(results: dict[Method, dict[float, RunScores]]) -> dict[str, dict[str, dict[str, object]]]:
    """Returns every run's numbers, by method and learning rate."""
    return {
        method: {f"{rate:g}": dataclasses.asdict(result) for rate, result in by_rate.items()}
        for method, by_rate in results.items()
    }


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raises `KeyboardInterrupt` on SIGTERM and SIGHUP as on Ctrl-C, so that every `with` block ends what it started.

    Only the first signal counts: ending processes is not interrupted.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in handled:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_engine() -> str:
    """Returns vLLM if it is installed, else transformers."""
    return "vllm" if importlib.util.find_spec("vllm") is not None else "hf"


@click.command()
@click.option(
    "--engine", type=click.Choice(["vllm", "hf"]), default=default_engine, help="Engine of the teacher."
)
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".demo"), show_default=True)
@click.option("--fresh", is_flag=True, help="Train another teacher, even if one of equal settings exists.")
@click.option("--teacher-steps", default=DemoSize().teacher_steps, show_default=True)
@click.option("--student-steps", default=DemoSize().student_steps, show_default=True)
@click.option("--stay", is_flag=True, help="Keep the services and their page up at the end, until Ctrl-C.")
def main(
    *, engine: str, work_dir: Path, fresh: bool, teacher_steps: int, student_steps: int, stay: bool
) -> None:
    """Distil a small model end to end, with all three programs."""
    started = time.monotonic()
    for name, value in SHARED_CORES.items():
        os.environ.setdefault(name, value)  # read when torch is first imported, later
    if fresh:
        for teacher in work_dir.glob("teacher-*"):
            shutil.rmtree(teacher)
    try:
        with signals_as_exceptions():
            demo(
                work_dir.resolve(),
                engine,
                DemoSize(teacher_steps=teacher_steps, student_steps=student_steps),
                stay=stay,
            )
    except KeyboardInterrupt:
        console.print("demo: interrupted; everything that it started has ended")
        sys.exit(130)
    except (ProgramError, RunFailedError, StillhouseError) as error:
        console.print(f"demo: {error}", style="red", markup=False)
        sys.exit(1)
    if not stay:
        console.print(f"demo: {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
