"""Driver of both comparisons: options, arms one after the other, scores, report and file; an interrupted one gives what it has."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.table import Table

from benchmarks.end_to_end.arms import ArmResult, Arms
from benchmarks.end_to_end.processes import run_process, tail
from benchmarks.end_to_end.sizes import Sizes, Work
from benchmarks.teacher.peers.environment import TRL, prepare
from examples.demo.__main__ import signals_as_exceptions

Command = TypeVar("Command", bound=Callable[..., Any])

PREPARE_S = 1800.0
MAX_PROCESSES_SHOWN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The parts of a comparison that differ between the two."""

    arms: tuple[str, ...]
    direction: str
    """Direction of the KL by which students are scored: "forward" or "reverse"."""
    ratios: Callable[[Sequence[ArmResult]], dict[str, float]]
    tables: Callable[[Outcome], Sequence[Table]]
    scores_start: bool = False
    """The student is scored before its first step, too."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """Results of the arms that ran."""

    arms: Arms
    results: list[ArmResult] = field(default_factory=list)
    start: ArmResult
    """The student before its first step; it has a score if the comparison asks for it."""


_SIZES = ("steps", "batch", "vocabulary", "precision", "rows", "teacher_steps")
"""Sizes that are options of both comparisons."""


def comparison_options(
    *, work: str, arms: Sequence[str], minutes: float, steps: int
) -> Callable[[Command], Command]:
    """Adds the options that both comparisons have; `work`, `minutes` and `steps` are defaults."""
    options = [
        click.option("--steps", default=steps, show_default=True, help="Updates."),
        click.option("--batch", default=16, show_default=True, help="Rows or texts of a step."),
        click.option("--vocabulary", default=32_000, show_default=True, help="Tokens of the tokenizer."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            default="fp32",
            show_default=True,
            help="Of all programs.",
        ),
        click.option(
            "--rows",
            type=click.Choice(["pairs", "texts"]),
            default="pairs",
            show_default=True,
            help="Prompts and completions of natural lengths, or texts, and prompts, of one length.",
        ),
        click.option("--teacher-steps", default=150, show_default=True, help="Training of the teacher."),
        click.option("--work", type=click.Path(path_type=Path), default=Path(work), show_default=True),
        click.option(
            "--json", "json_file", type=click.Path(path_type=Path), help="Write everything to this file."
        ),
        click.option(
            "--arm", "chosen", multiple=True, type=click.Choice(arms), help="Some arms; all if not given."
        ),
        click.option(
            "--text", type=click.Path(path_type=Path, exists=True), help="Text in place of Python's manual."
        ),
        click.option("--minutes", default=minutes, show_default=True, help="Most minutes of one arm."),
        click.option(
            "--with-earlier",
            is_flag=True,
            help="Report the arms that earlier calls left in the work folder, too.",
        ),
        click.option(
            "--report",
            is_flag=True,
            help="Run no arm; report those that earlier calls left in the work folder.",
        ),
        click.option(
            "--scores/--no-scores", default=True, show_default=True, help="Score the students at the end."
        ),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def take_sizes(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the sizes that are options of both comparisons out of the values of all options."""
    return {name: options.pop(name) for name in _SIZES}


def compare(
    comparison: Comparison,
    run: Callable[[Arms, str], ArmResult],
    sizes: Sizes,
    *,
    work: Path,
    json_file: Path | None,
    chosen: Sequence[str],
    text: Path | None,
    minutes: float,
    with_earlier: bool,
    report: bool,
    scores: bool,
) -> NoReturn:
    """Runs the chosen arms, prints and writes what they gave, and exits with 0 if each took all its steps."""
    console = Console(soft_wrap=True, width=170)
    outcome: Outcome | None = None
    with signals_as_exceptions():
        try:
            arms = _open_arms(work, sizes, text, minutes, console)
            start = ArmResult(name="start", folders={0: str(arms.work.path / "0")})
            outcome = Outcome(arms=arms, start=start)
            names = () if report else chosen or comparison.arms
            if with_earlier or report:
                others = (each for each in comparison.arms if each not in names)
                outcome.results += filter(None, map(arms.earlier, others))
            for name in names:
                outcome.results.append(run(arms, name))
                arms.keep(outcome.results[-1])
        except (KeyboardInterrupt, SystemExit):
            console.print("stopped early; what there is:")
        results = outcome.results if outcome is not None else []
        results.sort(key=lambda each: comparison.arms.index(each.name))
        if outcome is not None and results:
            before = [outcome.start] if comparison.scores_start else []
            seeds = [each for result in results for each in result.others]
            if scores:
                outcome.arms.score(comparison.direction, [*before, *results, *seeds])
            _report(console, comparison, outcome)
            if json_file is not None:
                json_file.write_text(json.dumps(_content(comparison, outcome), indent=2) + "\n")
    sys.exit(0 if results and not any(each.problem for each in results) else 1)


def memory_text(result: ArmResult) -> str:
    """Peak memory of the first processes of an arm."""
    return ", ".join(f"{name} {mib:.0f}" for name, mib in result.memory_mib[:MAX_PROCESSES_SHOWN])


def _open_arms(work: Path, sizes: Sizes, text: Path | None, minutes: float, console: Console) -> Arms:
    """Makes models and data once, and finds TRL."""
    folder = Work(work.resolve())
    log = folder.path.parent / f"{folder.path.name}-prepare.log"
    if not folder.fits(sizes):
        console.print("teacher, students and rows are made, once …")
    command: list[object] = [
        sys.executable,
        "-m",
        "benchmarks.end_to_end.prepare",
        folder.path,
        json.dumps(asdict(sizes)),
    ]
    code, _ = run_process([*command, *([text.resolve()] if text else [])], log=log, limit_s=PREPARE_S)
    if code != 0:
        raise click.ClickException(f"teacher and data could not be made: {tail(log)}")
    peers = prepare(console.print, [TRL])
    if peers.missing:
        console.print(f"without TRL: {peers.missing}")
    return Arms(
        work=folder,
        sizes=sizes,
        peers=None if peers.missing else peers.python,
        minutes=minutes,
        say=console.print,
    )


def _report(console: Console, comparison: Comparison, outcome: Outcome) -> None:
    for table in comparison.tables(outcome):
        console.print(table)
    for name, value in comparison.ratios(outcome.results).items():
        console.print(f"{name}: {value:.3f}")


def _content(comparison: Comparison, outcome: Outcome) -> dict[str, Any]:
    start = (
        {f"start_{comparison.direction}_kl": outcome.start.scores.get(0)} if comparison.scores_start else {}
    )
    return {
        **comparison.ratios(outcome.results),
        **start,
        "sizes": asdict(outcome.arms.sizes),
        "arms": [each.to_json() for each in outcome.results],
    }
