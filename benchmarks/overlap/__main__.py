"""Overlap of teacher and student: step time with online or cached targets, against the same steps with targets in
memory; with --shared-cores, both on the same cores.

The teacher is a real service pinned to one core; steps are those of the training process, pinned to another, with its
own streams, cache, batches and optimizer. Steps from memory and from the cache alternate, and so do blocks of them
with blocks of online steps; adjacent ones form a pair.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from examples.demo.__main__ import signals_as_exceptions
from tests.support.programs import start_teacher

KINDS = ("alone", "online", "cached")
REQUIRED = {"online_step_over_student_alone": 1.1, "cached_step_over_student_alone": 1.02}
"""Largest upper end of each interval."""
SHARED_CORES_REQUIRED = 0.8
"""Largest upper end of the interval with --shared-cores."""
TEACHER_LAYERS = (6, 4, 2, 1)
"""Teacher depths, tried in this order until the teacher is faster than the student by MARGIN."""
MARGIN = 1.15
LEAD_IN = 2
"""Untimed steps of a block: as many as a run prefetches, so that no block profits from a pause before it."""
RESAMPLES = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Measured times and rates."""

    times: Mapping[str, Sequence[float]]
    """Seconds per step in each block, by kind."""
    teacher_rate: float
    """Tokens per second of the idle teacher."""
    student_rate: float
    """Tokens per second with targets in memory."""
    teacher_layers: int
    waited_s: float
    """Total wait of timed steps for the teacher."""


@click.command()
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Add ratios and times to this file."
)
@click.option("--pairs", default=40, show_default=True, help="Blocks of each kind.")
@click.option("--steps", default=3, show_default=True, help="Timed steps of a block.")
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True)
@click.option(
    "--shared-cores",
    is_flag=True,
    help="Measure a run and its teacher on the same cores, as a run sets its threads and as OpenMP does.",
)
@click.option(
    "--cores", default="", help="Two cores, teacher's first; by default the first two that this process has."
)
def main(
    *, json_file: Path | None, pairs: int, steps: int, engine: str, shared_cores: bool, cores: str
) -> None:
    """Measure the cost of online and cached teachers for a student's step."""
    console = Console()
    if shared_cores:
        _share_cores(json_file, engine, pairs=pairs, steps=steps, console=console)
        return
    every = os.sched_getaffinity(0)
    named = [int(core) for core in cores.split(",") if core] or sorted(every)[:2]
    if len(set(named)) != 2:
        raise click.ClickException(f"teacher and student need a core each, and there are {named}")
    with signals_as_exceptions(), tempfile.TemporaryDirectory(prefix="stillhouse-overlap-") as directory:
        found = _measured(
            Path(directory), engine, named[0], named[1], pairs=pairs, steps=steps, console=console
        )
    times = found.times
    ratios: dict[str, float] = {}
    for name, most in REQUIRED.items():
        kind = name.split("_")[0]
        low, middle, high = interval(times[kind], times["alone"])
        ratios[name] = high
        console.print(
            f"{name}: median {middle:.4f}, 95 % interval [{low:.4f}, {high:.4f}] of {pairs} pairs (<= {most:g})",
            soft_wrap=True,
        )
    console.print(
        f"tokens/s: teacher {found.teacher_rate:.0f}, student {found.student_rate:.0f}; step alone "
        f"{statistics.median(times['alone']):.3f} s; waited for the teacher {found.waited_s:.3f} s in all",
        soft_wrap=True,
    )
    details = {
        "required": REQUIRED,
        "engine": engine,
        "teacher_tokens_per_s": found.teacher_rate,
        "student_tokens_per_s": found.student_rate,
        "teacher_layers": found.teacher_layers,
        "teacher_wait_s": found.waited_s,
        "step_s": {kind: list(each) for kind, each in times.items()},
    }
    _write(json_file, "overlap", ratios, details)


def _share_cores(json_file: Path | None, engine: str, *, pairs: int, steps: int, console: Console) -> None:
    """Measures and prints steps of a run that shares its cores with its teacher."""
    from benchmarks.overlap.shared_cores import KINDS, step_times

    with signals_as_exceptions(), tempfile.TemporaryDirectory(prefix="stillhouse-overlap-") as directory:
        times = step_times(Path(directory), engine, pairs=pairs, steps=steps, console=console)
    own, spinning = (times[kind] for kind in KINDS)
    low, middle, high = interval(own, spinning)
    name = "shared_cores_step_over_spinning"
    console.print(
        f"{name}: median {middle:.3f}, 95 % interval [{low:.3f}, {high:.3f}] of {pairs} pairs "
        f"(<= {SHARED_CORES_REQUIRED:g})",
        soft_wrap=True,
    )
    details = {"required": SHARED_CORES_REQUIRED, "engine": engine, "step_s": times}
    _write(json_file, "shared_cores", {name: high}, details)


def _write(
    json_file: Path | None, name: str, ratios: Mapping[str, float], details: Mapping[str, object]
) -> None:
    """Adds ratios and details to the file, if one is asked for."""
    if json_file is not None:
        content = json.loads(json_file.read_text()) if json_file.exists() else {}
        every = {**content.get("details", {}), name: details}
        json_file.write_text(json.dumps({**content, **ratios, "details": every}, indent=2) + "\n")


def interval(times: Sequence[float], alone: Sequence[float]) -> tuple[float, float, float]:
    """Median of times / alone over pairs, with its 95 % bootstrap interval: (lower, median, upper)."""
    ratios = np.array(times) / np.array(alone)
    chosen = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[chosen], axis=1), [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


def _measured(
    directory: Path,
    engine: str,
    teacher_core: int,
    student_core: int,
    *,
    pairs: int,
    steps: int,
    console: Console,
) -> StepTimes:
    from benchmarks.overlap.student import LENGTH, ROWS, Student, make_models, write_rows

    data = write_rows(directory / "rows.jsonl", ROWS, LENGTH)
    for layers in TEACHER_LAYERS:
        models = make_models(directory / f"models-{layers}", layers)
        with ExitStack() as stack:
            # Threads and processes start on their parent's cores.
            os.sched_setaffinity(0, {teacher_core})
            one_thread = {
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": str(teacher_core),
            }
            teacher = stack.enter_context(
                start_teacher(models.teacher, engine=engine, directory=directory, environment=one_thread)
            )
            os.sched_setaffinity(0, {student_core})
            student = stack.enter_context(
                Student.open(directory / f"run-{layers}", models.student, data, teacher.target)
            )
            teacher_rate, student_rate = student.rates()
            console.print(
                f"teacher of {layers} layers: {teacher_rate:.0f} tokens/s, student: {student_rate:.0f}",
                soft_wrap=True,
            )
            if teacher_rate < MARGIN * student_rate and layers != TEACHER_LAYERS[-1]:
                continue
            times: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for pair in range(pairs):
                # The order alternates, and so does the kind that follows a block with a busy teacher.
                memory = ("alone", "cached") if pair % 4 < 2 else ("cached", "alone")
                if pair % 2:
                    times["online"].append(student.block("online", LEAD_IN, steps))
                for kind, seconds in student.both(memory, LEAD_IN, steps).items():
                    times[kind].append(seconds)
                if not pair % 2:
                    times["online"].append(student.block("online", LEAD_IN, steps))
            return StepTimes(
                times=times,
                teacher_rate=teacher_rate,
                student_rate=student_rate,
                teacher_layers=layers,
                waited_s=student.waited_s,
            )
    raise click.ClickException("no teacher is as fast as the student")


if __name__ == "__main__":
    main()
