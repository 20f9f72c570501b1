"""Seconds of five starts with their stages: a run from `run create` to its first step, the first one of a service that has been up
for a while, one that is created a while after another's end, one that was queued from the end of the run before it, and a teacher to
its first answer.

Prints the CPU seconds of a start beside the clock's, which other work on the machine does not change, and those of the
imports alone; and `stillhouse --help`, whose limit is MAX_HELP_S. Models are small and made on the spot: weights of a real size
add their reading.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.overlap.student import LENGTH, make_models, write_rows
from benchmarks.start.timeline import Stage, longest, timeline
from examples.demo.__main__ import signals_as_exceptions
from stillhouse.client.api import Teacher, Trainer
from stillhouse.client.trainer.run_handle import RunHandle
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec
from tests.support.programs import start_teacher, start_trainer

MAX_HELP_S = 0.15
WAIT_S = 300.0
QUEUED_S = 20.0
"""Time in the queue, from a service's start, or between two runs, in which a standby process has imported its libraries."""
ENDLESS = 1_000_000
IMPORTS = {
    "torch": "import torch",
    "transformers": "import transformers.models.auto.modeling_auto",
    "a run": "import stillhouse.student_trainer.train.loop",
    "a run's model": "import stillhouse.student_trainer.train.loop, transformers.models.qwen2.modeling_qwen2",
    "an adapter": "import stillhouse.student_trainer.train.loop, transformers.models.qwen2.modeling_qwen2, peft",
    "the run service": "import stillhouse.student_trainer.runs.__main__",
    "a teacher, before its engine": "import stillhouse.teacher_service.__main__",
    "vllm": "import vllm",
    "the command line": "import stillhouse.client.cli",
}


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything to this file.")
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="vllm", show_default=True)
@click.option("--lora", is_flag=True, help="Let the run train an adapter.")
@click.option("--repeat", default=3, show_default=True, help="Runs; the first finds nothing prepared.")
@click.option("--standby", type=click.Choice(["off", "queue", "always"]), default="queue", show_default=True)
@click.option(
    "--imports/--no-imports", default=True, show_default=True, help="Measure imports by themselves too."
)
def main(
    *, json_file: Path | None, engine: str, lora: bool, repeat: int, standby: str, imports: bool
) -> None:
    """Measure how long programs take to start."""
    console = Console(soft_wrap=True, width=170)
    figures: dict[str, Any] = {
        "engine": engine,
        "lora": lora,
        "standby": standby,
        "cores": len(os.sched_getaffinity(0)),
    }
    with signals_as_exceptions(), tempfile.TemporaryDirectory(prefix="stillhouse-start-") as directory:
        try:
            figures["help_cpu_s"] = _cpu_of([str(Path(sys.executable).with_name("stillhouse")), "--help"])
            figures["imports_cpu_s"] = {
                name: _cpu_of([sys.executable, "-c", code])
                for name, code in (IMPORTS if imports else {}).items()
            }
            _measure(Path(directory), figures, engine, lora=lora, repeat=repeat, standby=standby)
        except (KeyboardInterrupt, SystemExit):
            console.print("stopped early; what there is:")
    _report(console, figures)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if figures.get("help_cpu_s", 0.0) <= MAX_HELP_S else 1)


def _cpu_of(command: Sequence[str], times: int = 3) -> float:
    """Median CPU seconds, user and system, of a command and what it waits for."""
    found = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            return float("nan")
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(found)


def _measure(
    directory: Path, figures: dict[str, Any], engine: str, *, lora: bool, repeat: int, standby: str
) -> None:
    models = make_models(directory / "models", 2)
    rows = write_rows(directory / "rows.jsonl", 256, LENGTH)
    options = ["--standby", standby]
    with ExitStack() as stack:
        began_s = time.time()
        teacher = stack.enter_context(start_teacher(models.teacher, engine=engine, directory=directory))
        client = stack.enter_context(Teacher(teacher.target))
        next(client.score([("first", list(range(1, 33)))], top_k=8))
        answered_s = time.time()
        cpu_s = sum(_cpu_seconds(each) for each in _tree(teacher.pid))
        stages = timeline(teacher.log(10**7), began_s, answered_s, "first answer")
        figures["teacher"] = _figures(stages, cpu_s)
        service = stack.enter_context(start_trainer(directory / "data", directory=directory, options=options))
        trainer = stack.enter_context(Trainer(service.target))
        spec = _spec(models.student, rows, teacher.target, lora=lora)
        figures["runs"] = [_start_run(trainer, directory / "data", spec) for _ in range(repeat)]
        figures["first"] = []
        for number in range(repeat):
            data = directory / f"first-{number}"
            with (
                start_trainer(data, directory=data.with_suffix(".log"), options=options) as other,
                Trainer(other.target) as of_other,
            ):
                figures["first"].append(_start_run(of_other, data, spec, after_s=QUEUED_S))
        figures["later"] = [
            _start_run(trainer, directory / "data", spec, after_s=QUEUED_S) for _ in range(repeat)
        ]
        figures["queued"] = [_start_queued_run(trainer, directory / "data", spec) for _ in range(repeat)]


def _spec(student: Path, rows: Path, target: str, *, lora: bool) -> RunSpec:
    spec = RunSpec()
    spec.student.model = str(student)
    if lora:
        spec.student.lora.rank = 8
    spec.teachers.add(targets=[target])
    spec.data.train.add(path=str(rows))
    spec.data.max_sequence_tokens = LENGTH
    spec.data.eval_fraction = 0.0
    spec.optimizer.max_steps = 2
    spec.optimizer.batch_size = 4
    return spec


def _start_run(trainer: Trainer, data: Path, spec: RunSpec, *, after_s: float = 0.0) -> dict[str, Any]:
    time.sleep(after_s)
    began_s = time.time()
    return _until_first_step(trainer.create_run(spec), data, began_s)


def _start_queued_run(trainer: Trainer, data: Path, spec: RunSpec) -> dict[str, Any]:
    before = RunSpec()
    before.CopyFrom(spec)
    before.optimizer.max_steps = ENDLESS
    ahead = trainer.create_run(before)
    run = trainer.create_run(spec)
    _until_first_step(ahead, data, time.time(), end=False)
    time.sleep(QUEUED_S)
    ahead.stop()
    ahead.wait()
    return _until_first_step(run, data, time.time())


def _until_first_step(run: RunHandle, data: Path, began_s: float, *, end: bool = True) -> dict[str, Any]:
    folder = data / run.name
    metrics = folder / "metrics.jsonl"
    until_s = time.monotonic() + WAIT_S
    cpu_s = 0.0
    while not (metrics.exists() and "train/loss" in metrics.read_text()):
        if time.monotonic() > until_s or run.get().state == Run.STATE_FAILED:
            raise click.ClickException(f"{run.name} took no step: {run.get().error.message}")
        cpu_s = max(cpu_s, _training_cpu_s(folder))
        time.sleep(0.05)
    stepped_s = time.time()
    log = folder / "attempts" / "1" / "log"
    if end:
        run.wait()
    return _figures(timeline(log.read_text(errors="replace"), began_s, stepped_s, "first step"), cpu_s)


def _training_cpu_s(folder: Path) -> float:
    """CPU seconds of a run's process, with those that it needed before it had the run."""
    try:
        return _cpu_seconds(psutil.Process(int(json.loads((folder / "process.json").read_text())["pid"])))
    except (OSError, psutil.Error):
        return 0.0


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _figures(stages: Sequence[Stage], cpu_s: float) -> dict[str, Any]:
    return {
        "seconds": stages[-1].at_s,
        "cpu_s": cpu_s,
        "stages": [{"name": each.name, "at_s": each.at_s, "seconds": each.seconds} for each in stages],
    }


def _report(console: Console, figures: dict[str, Any]) -> None:
    if "help_cpu_s" in figures:
        console.print(f"stillhouse --help: {figures['help_cpu_s']:.3f} s of CPU (<= {MAX_HELP_S:g})")
    table = Table("what is imported", "CPU s")
    for name, seconds in figures.get("imports_cpu_s", {}).items():
        table.add_row(name, f"{seconds:.2f}")
    console.print(table)
    starts = [("teacher to its first answer", figures.get("teacher"))]
    starts += [
        (f"run {number + 1} to its first step", each) for number, each in enumerate(figures.get("runs", ()))
    ]
    starts += [
        (f"first run of service {number + 1}, created {QUEUED_S:g} s after its start", each)
        for number, each in enumerate(figures.get("first", ()))
    ]
    starts += [
        (f"run {number + 1} created {QUEUED_S:g} s after another's end", each)
        for number, each in enumerate(figures.get("later", ()))
    ]
    starts += [
        (f"queued run {number + 1}, from the end of the one before it", each)
        for number, each in enumerate(figures.get("queued", ()))
    ]
    for title, start in starts:
        if start is None:
            continue
        stages = [Stage(**each) for each in start["stages"]]
        worst = {each.name for each in longest(stages)}
        table = Table(
            "until",
            "s",
            "at s",
            "",
            title=f"{title}: {start['seconds']:.1f} s, {start['cpu_s']:.1f} s of CPU",
        )
        for stage in stages:
            mark = "longest third" if stage.name in worst else ""
            table.add_row(stage.name, f"{stage.seconds:.2f}", f"{stage.at_s:.2f}", mark)
        console.print(table)


if __name__ == "__main__":
    main()
