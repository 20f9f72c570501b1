"""Distillation against cross-entropy: paired students through all three programs, several seeds, and a control that
must lose.

Three kinds of students share weights, rows, order and steps: one trains with cross-entropy, one from the teacher, one
from the teacher's rows in a shuffled order. The first two use the learning rate of one grid with the lowest held-out
perplexity on an extra seed each; the control uses the second's. Results are stored run by run, so an interrupted
experiment resumes.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.distillation.report import differences_table, is_better, students_table
from examples.demo.__main__ import default_engine, signals_as_exceptions
from examples.demo.comparison import (
    LARGEST_TOP_K,
    Recipe,
    RunFailedError,
    RunScores,
    Scores,
    best_learning_rate,
    complete,
    run_spec,
)
from stillhouse.client.api import StillhouseError, Trainer
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from tests.support.programs import ProgramError, start_program, start_teacher, start_trainer
from tests.support.train_teacher import read_documents

Kind = Literal["cross-entropy", "distilled", "shuffled"]
COMPARED: tuple[Kind, ...] = ("cross-entropy", "distilled")
PAIRS = (("distilled", "cross-entropy"), ("shuffled", "cross-entropy"), ("shuffled", "distilled"))
GRID_SEED = 1000
ROWS_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of the experiment."""

    kind: Kind
    seed: int
    learning_rate: float

    @property
    def key(self) -> str:
        """Key in the results file."""
        return f"{self.kind}/seed-{self.seed}/lr-{self.learning_rate:g}"


class Results:
    """Results so far, in a file rewritten atomically after every run."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._settings = settings
        self._results: dict[str, RunScores] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] != settings:
                raise click.ClickException(
                    f"{path} holds an experiment with other settings: {stored['settings']}; name another --work-dir."
                )
            self._results = {key: _read(value) for key, value in stored["runs"].items()}

    def __contains__(self, job: Job) -> bool:
        return job.key in self._results

    def __getitem__(self, job: Job) -> RunScores:
        return self._results[job.key]

    def add(self, job: Job, measured: RunScores) -> None:
        """Stores the result of one run."""
        self._results[job.key] = measured
        runs = {key: dataclasses.asdict(value) for key, value in self._results.items()}
        write_atomic(self._path, json.dumps({"settings": self._settings, "runs": runs}, indent=2).encode())


def _read(value: dict[str, Any]) -> RunScores:
    return RunScores(name=value["name"], before=Scores(**value["before"]), after=Scores(**value["after"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The running programs and settings shared by all runs."""

    client: Trainer
    targets: dict[Kind, str]
    """Teacher address of each kind of student."""
    recipe: Recipe
    student_dir: Path
    work_dir: Path
    results: Results

    def run(self, jobs: Sequence[Job]) -> None:
        """Completes the `jobs` without results."""
        missing = [job for job in jobs if job not in self.results]
        for index, measured in complete(self.client, [self._spec(job) for job in missing]):
            self.results.add(missing[index], measured)
            after = measured.after
            click.echo(
                f"{missing[index].key}: KL {after.kl:.4f}, perplexity {after.perplexity:.4f}, agreement {after.agreement:.4f}",
                err=True,
            )

    def _spec(self, job: Job) -> RunSpec:
        return run_spec(
            self.recipe,
            student=student_of_seed(self.student_dir, self.work_dir / "students" / str(job.seed), job.seed),
            teacher=self.targets[job.kind],
            method="cross-entropy" if job.kind == "cross-entropy" else "distilled",
            learning_rate=job.learning_rate,
            seed=job.seed,
            display_name=job.key,
        )


def experiment(
    bench: Bench, learning_rates: Sequence[float], num_seeds: int, num_control_seeds: int
) -> dict[str, Any]:
    """Runs the grid on the extra seed, then the pairs, then the control; returns results by kind."""
    grid = {
        kind: [Job(kind=kind, seed=GRID_SEED, learning_rate=rate) for rate in learning_rates]
        for kind in COMPARED
    }
    bench.run([job for jobs in grid.values() for job in jobs])
    best: dict[Kind, float] = {
        kind: best_learning_rate({job.learning_rate: bench.results[job] for job in jobs})
        for kind, jobs in grid.items()
    }
    best["shuffled"] = best["distilled"]
    num_seeds_of: dict[Kind, int] = {**dict.fromkeys(COMPARED, num_seeds), "shuffled": num_control_seeds}
    jobs = {
        kind: [Job(kind=kind, seed=seed, learning_rate=best[kind]) for seed in range(num_seeds_of[kind])]
        for kind in best
    }
    # Seed by seed, so that an interrupted experiment has complete pairs.
    bench.run([job for together in zip(*(jobs[kind] for kind in COMPARED), strict=True) for job in together])
    bench.run(jobs["shuffled"])
    return {
        "learning_rates": best,
        "runs": {kind: [bench.results[job] for job in jobs[kind]] for kind in jobs},
    }


def student_of_seed(student_dir: Path, directory: Path, seed: int) -> Path:
    """Writes the student's configuration and tokenizer with random weights of a seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (directory / "tokenizer.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(student_dir), dtype=torch.float32
            )
        model.save_pretrained(directory, safe_serialization=True)
        AutoTokenizer.from_pretrained(student_dir).save_pretrained(directory)
    return directory


def write_data(
    data: Path, held_out: Path, work_dir: Path, *, template: str, train_rows: int, held_out_rows: int
) -> tuple[Path, Path]:
    """Writes disjoint training and held-out rows with one field `text`."""
    held_out_texts = list(read_documents(held_out, "{text}"))
    random.Random(ROWS_SEED).shuffle(held_out_texts)
    known = set(held_out_texts)
    train_texts = [text for text in read_documents(data, template) if text not in known]
    random.Random(ROWS_SEED).shuffle(train_texts)
    return (
        _write_texts(work_dir / "train.jsonl", train_texts[:train_rows]),
        _write_texts(work_dir / "held_out.jsonl", held_out_texts[:held_out_rows]),
    )


def _write_texts(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def report(outcome: dict[str, Any]) -> Iterator[str]:
    """Renders the experiment as Markdown."""
    runs = outcome["runs"]
    before = [result.before for result in runs["distilled"]]
    yield students_table(before, runs, outcome["learning_rates"])
    yield ""
    yield differences_table(runs, PAIRS)
    yield ""
    yield from (f"- {claim}: {'yes' if holds else 'NO'}" for claim, holds in claims(runs).items())


def claims(runs: dict[str, list[RunScores]]) -> dict[str, bool]:
    """Claims, each on its complete 95 % interval."""
    return {
        "distilled beats cross-entropy in held-out KL": is_better(
            runs["distilled"], runs["cross-entropy"], "kl"
        ),
        "distilled beats cross-entropy in perplexity": is_better(
            runs["distilled"], runs["cross-entropy"], "perplexity"
        ),
        "shuffled rows lose against cross-entropy in held-out KL": is_better(
            runs["cross-entropy"], runs["shuffled"], "kl"
        ),
        "shuffled rows lose against distilled in held-out KL": is_better(
            runs["distilled"], runs["shuffled"], "kl"
        ),
    }


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--student",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Model whose configuration is used; weights are random per seed.",
)
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True), required=True, help="Text to train students on."
)
@click.option("--template", default="{text}", show_default=True, help="Template of a JSONL row of --data.")
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    help="JSONL with `text`; default: held_out.jsonl beside the teacher.",
)
@click.option("--train-rows", default=512, show_default=True)
@click.option("--held-out-rows", default=128, show_default=True)
@click.option("--steps", default=300, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--max-sequence-tokens", default=256, show_default=True)
@click.option("--top-k", default=64, show_default=True, help=f"Below {LARGEST_TOP_K}, which evaluations use.")
@click.option("--learning-rates", default="5e-4,1e-3,2e-3,4e-3", show_default=True)
@click.option("--seeds", "num_seeds", default=5, show_default=True)
@click.option("--control-seeds", "num_control_seeds", default=3, show_default=True, help="At most --seeds.")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), default=default_engine)
@click.option("--slots", default=1, show_default=True, help="Concurrent runs on a CPU.")
@click.option("--teacher-option", "teacher_options", multiple=True, help="Option of stillhouse-teacher.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of results; name it again to resume.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for everything as JSON.")
def main(
    *,
    teacher: Path,
    student: Path,
    data: Path,
    template: str,
    held_out: Path | None,
    learning_rates: str,
    num_seeds: int,
    num_control_seeds: int,
    engine: str,
    slots: int,
    teacher_options: Sequence[str],
    work_dir: Path,
    json_file: Path | None,
    **sizes: int,
) -> None:
    """Compare distilled students with cross-entropy students, and with a control."""
    if sizes["top_k"] >= LARGEST_TOP_K:
        raise click.ClickException(
            f"--top-k is {sizes['top_k']}; evaluations ask for {LARGEST_TOP_K}, by which the control tells them apart: lower it."
        )
    work_dir = work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        **sizes, "teacher": str(teacher), "student": str(student), "data": str(data), "engine": engine,
        "template": template,
    }  # fmt: skip
    results = Results(work_dir / "results.json", settings)
    train, evaluate = write_data(
        data,
        held_out or teacher / "held_out.jsonl",
        work_dir,
        template=template.replace("\\n", "\n"),
        train_rows=sizes["train_rows"],
        held_out_rows=sizes["held_out_rows"],
    )
    recipe = Recipe(
        train=train,
        held_out=evaluate,
        held_out_rows=sizes["held_out_rows"],
        steps=sizes["steps"],
        batch_size=sizes["batch_size"],
        max_sequence_tokens=sizes["max_sequence_tokens"],
        top_k=sizes["top_k"],
    )
    try:
        with signals_as_exceptions(), ExitStack() as stack:
            logs = work_dir / "logs"
            served = stack.enter_context(
                start_teacher(teacher, engine=engine, directory=logs, options=teacher_options)
            )
            shuffled = stack.enter_context(
                start_program(
                    "shuffling-proxy",
                    [
                        "benchmarks.distillation.shuffling_proxy",
                        "--target",
                        served.target,
                        "--top-k",
                        str(recipe.top_k),
                    ],
                    directory=logs,
                )
            )
            service = stack.enter_context(
                start_trainer(
                    work_dir / "trainer",
                    directory=logs,
                    options=["--cpu-slots", str(slots), "--stop-runs-on-exit", "--stop-grace-s", "5"],
                )
            )
            bench = Bench(
                client=stack.enter_context(Trainer(service.target)),
                targets={
                    "cross-entropy": served.target,
                    "distilled": served.target,
                    "shuffled": shuffled.target,
                },
                recipe=recipe,
                student_dir=student,
                work_dir=work_dir,
                results=results,
            )
            rates = [float(rate) for rate in learning_rates.split(",")]
            outcome = experiment(bench, rates, num_seeds, min(num_seeds, num_control_seeds))
    except (ProgramError, RunFailedError, StillhouseError) as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(report(outcome)))
    if json_file is not None:
        runs = {
            kind: [dataclasses.asdict(result) for result in results]
            for kind, results in outcome["runs"].items()
        }
        json_file.write_text(json.dumps({"settings": settings, **outcome, "runs": runs}, indent=2))
    sys.exit(0 if all(claims(outcome["runs"]).values()) else 1)


if __name__ == "__main__":
    main()
