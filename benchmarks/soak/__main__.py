"""Soak of a shared teacher: two trainers and a batch job for minutes, with each client's share and the teacher's
memory.

All programs are real: a run service with two runs, and `stillhouse generate --in`. The teacher is larger than the
students, so that all three wait for it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.teacher.models import Shape, make_teacher
from benchmarks.teacher.timed_pass import PassInput
from examples.demo.__main__ import default_engine, signals_as_exceptions
from stillhouse.client.api import RunHandle, StillhouseError, Teacher, Trainer
from stillhouse.client.batch.input_rows import Sampling
from stillhouse.client.batch.pipeline import BatchProgress, BatchSettings, Listeners, generate_file
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec
from tests.support.programs import ProgramError, start_teacher, start_trainer
from tests.support.small_models import make_student

TRAINERS = ("trainer 1", "trainer 2")
BATCH = "batch job"
TEACHER = Shape(
    name="soak",
    vocab_size=4096,
    hidden_size=512,
    num_layers=6,
    num_heads=8,
    num_kv_heads=8,
    intermediate_size=1536,
    num_sequences=0,
    length=0,
    num_texts=0,
)
ROW_TOKENS = 192
PROMPT_TOKENS = 64
NEW_TOKENS = 64
BATCH_ROWS = 200
LEAST_PARITY = 0.75
"""Smallest ratio between the two trainers' tokens."""
LEAST_BATCH_SHARE = 0.08
"""Smallest share of all tokens. A generated token costs the engine several read ones, and shares are of the engine's
capacity."""
MOST_GROWTH = 0.02
"""Largest growth of the teacher's memory, from the first third after the warm-up to the last."""
STEPS = 1_000_000
"""More steps than time allows: runs are stopped."""
WARM_UP = 0.25
"""Share of the time before shares and slope are measured."""
START_TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """State at one moment."""

    seconds: float
    tokens: dict[str, float]
    """Tokens of each client so far."""
    resident_bytes: int
    """Private memory of the teacher and all its processes."""


class BatchJob:
    """Client thread that completes one file of prompts after the other."""

    def __init__(self, target: str, directory: Path) -> None:
        self._teacher, self._directory = Teacher(target), directory
        self._stopped = threading.Event()
        self._done = self._current = 0
        self.failed_rows = 0
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="batch-job", daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> float:
        """Prompt and generated tokens of all completed rows."""
        return self._done + self._current

    def stop(self) -> None:
        """Stops in the middle of a file."""
        self._stopped.set()
        self._teacher.close()
        self._thread.join()

    def _work(self) -> None:
        number = 0
        try:
            while not self._stopped.is_set():
                self._answer(number)
                number += 1
        except BaseException as error:
            if not self._stopped.is_set():
                self.failure = error

    def _answer(self, number: int) -> None:
        source = self._directory / f"prompts-{number}.jsonl"
        work = PassInput(count=BATCH_ROWS, length=PROMPT_TOKENS, vocab_size=TEACHER.vocab_size, seed=number)
        rows = ({"id": index, "token_ids": ids.tolist()} for index, ids in enumerate(work.sequences()))
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def show(progress: BatchProgress) -> None:
            self._current = progress.tokens + PROMPT_TOKENS * progress.rows
            if self._stopped.is_set():
                raise InterruptedError

        settings = BatchSettings(sampling=Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS))
        out = self._directory / f"answers-{number}.jsonl"
        summary = generate_file(self._teacher, source, out, settings, Listeners(progress=show))
        self.failed_rows += summary.failed
        self._done, self._current = self._done + self._current, 0
        for path in self._directory.glob(f"*-{number}.jsonl*"):
            path.unlink()


def run_spec(student: Path, teacher: str, data: Path, seed: int) -> RunSpec:
    """Builds a run that queries the teacher faster than it can respond."""
    spec = RunSpec(display_name=f"soak {seed}")
    spec.student.model = str(student)
    spec.teachers.add(targets=[teacher])
    spec.data.train.add(path=str(data))
    spec.data.max_sequence_tokens = 2 * ROW_TOKENS
    spec.loss.top_k, spec.loss.sparse_target = 64, "tail_bucket"
    spec.optimizer.learning_rate = 1e-3
    spec.optimizer.max_steps = STEPS
    spec.optimizer.micro_batch_size = 8
    spec.optimizer.seed = seed
    return spec


def write_rows(path: Path, seed: int) -> Path:
    """Writes texts of about ROW_TOKENS tokens each."""
    chooser = np.random.default_rng(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    with path.open("w") as file:
        for _ in range(2000):
            words = ["".join(chooser.choice(syllables, 3)) for _ in range(ROW_TOKENS // 3)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def resident_bytes(pid: int) -> int:
    """Private memory of a process and its descendants, without shared pages."""
    total = 0
    family = psutil.Process(pid)
    for process in (family, *family.children(recursive=True)):
        try:
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


def trained_tokens(run: RunHandle) -> float:
    """Tokens that a run has trained on."""
    series = run.metrics("train/trained_tokens").get("train/trained_tokens")
    return float(series.values[-1]) if series is not None and len(series.values) else 0.0


def slope(samples: Sequence[Sample]) -> float:
    """Growth of the teacher in bytes per minute, the slope of a line through the samples."""
    if len(samples) < 2:
        return 0.0
    minutes = np.array([sample.seconds / 60 for sample in samples])
    return float(np.polyfit(minutes, [sample.resident_bytes for sample in samples], 1)[0])


def shares(first: Sample, last: Sample) -> dict[str, float]:
    """Share of each client in all tokens between two samples."""
    got = {name: last.tokens[name] - first.tokens[name] for name in first.tokens}
    total = sum(got.values())
    return {name: tokens / total if total else 0.0 for name, tokens in got.items()}


def settled(samples: Sequence[Sample]) -> list[Sample]:
    """Samples after the warm-up, at least the last two."""
    begin = WARM_UP * samples[-1].seconds
    late = [sample for sample in samples if sample.seconds >= begin]
    return late if len(late) >= 2 else list(samples[-2:])


def soak(
    engine: str, minutes: float, interval_s: float, directory: Path, log: Callable[[str], None]
) -> tuple[list[Sample], list[str]]:
    """Runs the soak; returns samples and failures."""
    log("making a teacher and two students")
    model = make_teacher(TEACHER, directory / "teacher")
    students = [
        make_student(
            model, directory / f"student-{seed}", hidden_size=64, num_layers=1, num_heads=2, seed=seed
        )
        for seed in range(len(TRAINERS))
    ]
    with ExitStack() as running:
        teacher = running.enter_context(
            start_teacher(
                model,
                engine=engine,
                directory=directory,
                options=["--dtype", "bfloat16", "--max-adapters", "0"],
            )
        )
        service = running.enter_context(
            start_trainer(
                directory / "runs", directory=directory, options=["--cpu-slots", str(len(TRAINERS))]
            )
        )
        with Teacher(teacher.target) as client:
            log(f"teacher: {client.info().engine}")
        trainer = running.enter_context(Trainer(service.target))
        runs = {
            name: trainer.create_run(
                run_spec(student, teacher.target, write_rows(directory / f"rows-{seed}.jsonl", seed), seed)
            )
            for seed, (name, student) in enumerate(zip(TRAINERS, students, strict=True))
        }
        _wait_until_learning(runs)
        batch = BatchJob(teacher.target, directory)
        running.callback(batch.stop)
        log("two trainers train and a batch job generates")
        samples: list[Sample] = []
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < 60 * minutes or len(samples) < 2:
            tokens = {name: trained_tokens(run) for name, run in runs.items()} | {BATCH: batch.tokens}
            samples.append(Sample(seconds=passed, tokens=tokens, resident_bytes=resident_bytes(teacher.pid)))
            if len(samples) > 1:
                log(_line(samples[-2], samples[-1]))
            failures = _failures(runs, batch)
            if failures:
                return samples, failures
            time.sleep(min(interval_s, max(0.1, begin + 60 * minutes - time.monotonic())))
        return samples, _failures(runs, batch)


def _wait_until_learning(runs: dict[str, RunHandle]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not all(trained_tokens(run) for run in runs.values()):
        failed = [run.get().error.message for run in runs.values() if run.get().state == Run.STATE_FAILED]
        if failed or time.monotonic() > deadline:
            raise ProgramError(f"the runs do not learn: {'; '.join(failed) or 'no step in time'}")
        time.sleep(0.5)


def _failures(runs: dict[str, RunHandle], batch: BatchJob) -> list[str]:
    failures = []
    for name, run in runs.items():
        state = run.get()
        if state.state != Run.STATE_RUNNING:
            failures.append(f"{name} is {Run.State.Name(state.state)}: {state.error.message}")
    if batch.failure is not None:
        failures.append(f"{BATCH}: {batch.failure}")
    if batch.failed_rows:
        failures.append(f"{BATCH}: {batch.failed_rows} rows failed")
    return failures


def _line(before: Sample, after: Sample) -> str:
    part = shares(before, after)
    seconds = after.seconds - before.seconds
    rate = (sum(after.tokens.values()) - sum(before.tokens.values())) / seconds
    got = ", ".join(f"{name} {share:.0%}" for name, share in part.items())
    return (
        f"{after.seconds:5.0f} s: {rate:,.0f} tok/s: {got}; teacher {after.resident_bytes / 2**20:,.0f} MiB"
    )


def report(samples: Sequence[Sample], failures: Sequence[str]) -> Table:
    """Renders shares and rates after the warm-up, memory, failures and verdict."""
    late = settled(samples)
    first, last = late[0], late[-1]
    minutes = (last.seconds - first.seconds) / 60
    shown = Table(
        title=f"{samples[-1].seconds / 60:.1f} minutes; shares and slope of the last {minutes:.1f}",
        show_header=False,
    )
    for name, share in shares(first, last).items():
        rate = (last.tokens[name] - first.tokens[name]) / (last.seconds - first.seconds)
        shown.add_row(name, f"{share:.1%} of the tokens, {rate:,.0f} tok/s")
    sizes = [sample.resident_bytes / 2**20 for sample in late]
    shown.add_row(
        "teacher's memory",
        f"{sizes[0]:,.0f} MiB after the warm-up, {sizes[len(sizes) // 2]:,.0f} in the middle, {sizes[-1]:,.0f} at the end, "
        f"at most {max(sizes):,.0f}; {slope(late) / 2**20:+.2f} MiB a minute",
    )
    shown.add_row("failures", "; ".join(failures) or "none")
    shown.add_row("verdict", "; ".join(failed_criteria(samples, failures)) or "fair and flat")
    return shown


def failed_criteria(samples: Sequence[Sample], failures: Sequence[str]) -> list[str]:
    """Failed criteria: parity of the trainers, share of the batch job, memory growth."""
    late = settled(samples)
    part = shares(late[0], late[-1])
    least, most = sorted(part[name] for name in TRAINERS)
    found = [f"{len(failures)} failures"] if failures else []
    if least < LEAST_PARITY * most:
        found.append(f"unfair: one trainer got {least:.1%} of the tokens, the other {most:.1%}")
    if part[BATCH] < LEAST_BATCH_SHARE:
        found.append(f"unfair: the {BATCH} got {part[BATCH]:.1%} of the tokens")
    third = max(1, len(late) // 3)
    before, after = (
        np.mean([each.resident_bytes for each in some]) for some in (late[:third], late[-third:])
    )
    if after > (1 + MOST_GROWTH) * before:
        found.append(f"not flat: the teacher's memory grew by {after / before - 1:.1%}")
    return found


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--interval-s", type=float, default=15.0, show_default=True, help="Interval between samples.")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), help="[default: vllm if installed, else hf]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every sample to this file.")
def main(*, minutes: float, interval_s: float, engine: str | None, json_file: Path | None) -> None:
    """Share a teacher between two trainers and a batch job; print their shares and the teacher's memory."""

    def log(line: str) -> None:
        click.echo(line, err=True)

    try:
        with (
            signals_as_exceptions(),
            tempfile.TemporaryDirectory(prefix="stillhouse-soak-", ignore_cleanup_errors=True) as directory,
        ):
            samples, failures = soak(engine or default_engine(), minutes, interval_s, Path(directory), log)
    except (ProgramError, StillhouseError) as error:
        raise click.ClickException(str(error)) from error
    Console(width=120).print(report(samples, failures))
    if json_file is not None:
        content = [
            {"seconds": each.seconds, "tokens": each.tokens, "resident_bytes": each.resident_bytes}
            for each in samples
        ]
        json_file.write_text(json.dumps({"samples": content, "failures": failures}, indent=2) + "\n")
    sys.exit(1 if failed_criteria(samples, failures) else 0)


if __name__ == "__main__":
    main()
