"""Seconds to equal quality of four ways to distil, side by side: same cores, weights, rows, order, optimiser and steps.

Stillhouse online (teacher and training process, gRPC), Stillhouse from a cache, TRL's GKDTrainer with a teacher in its process
and full logits, and TRL's ServerDistillationTrainer against `vllm serve`, which gets the given texts where it would generate.
Seconds count from the first step on, start-up apart; every student is scored afterwards with the teacher's whole
distributions. An interrupted comparison prints what it has.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.end_to_end.arms import ArmResult, Arms
from benchmarks.end_to_end.processes import run_process, tail
from benchmarks.end_to_end.runs import off_policy_spec
from benchmarks.end_to_end.sizes import DEFAULT, Sizes, Work
from benchmarks.teacher.peers.environment import TRL, prepare
from examples.demo.__main__ import signals_as_exceptions

ARMS = ("online", "cached", "trl-local", "trl-server")
PREPARE_S = 1800.0


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path(".bench/end-to-end"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything to this file.")
@click.option("--arm", "chosen", multiple=True, type=click.Choice(ARMS), help="Some arms; all if not given.")
@click.option(
    "--text", type=click.Path(path_type=Path, exists=True), help="Text in place of Python's manual."
)
@click.option("--minutes", default=4.0, show_default=True, help="Most minutes of one arm.")
@click.option("--steps", default=DEFAULT.steps, show_default=True)
@click.option("--batch", default=DEFAULT.batch, show_default=True, help="Rows of a step.")
@click.option("--length", default=DEFAULT.length, show_default=True, help="Longest row, in tokens.")
@click.option(
    "--teacher-steps", default=DEFAULT.teacher_steps, show_default=True, help="Training of the teacher."
)
def main(
    *,
    work: Path,
    json_file: Path | None,
    chosen: Sequence[str],
    text: Path | None,
    minutes: float,
    **sizes: int,
) -> None:
    """Compare ways to distil by their time to equal quality."""
    console = Console(soft_wrap=True, width=170)
    results: list[ArmResult] = []
    arms: Arms | None = None
    with signals_as_exceptions():
        try:
            arms = open_arms(work, Sizes(**sizes), text, minutes, console)
            for name in chosen or ARMS:
                results.append(_run(arms, name))
        except (KeyboardInterrupt, SystemExit):
            console.print("stopped early; what there is:")
        if arms is not None and results:
            arms.score("forward", results)
            _report(console, results, arms)
            _write(json_file, results, arms)
    complete = bool(results) and all(not each.problem for each in results)
    sys.exit(0 if complete else 1)


def open_arms(work: Path, sizes: Sizes, text: Path | None, minutes: float, console: Console) -> Arms:
    """Makes models and data once, and finds TRL."""
    folder = Work(work.resolve())
    log = folder.path.parent / f"{folder.path.name}-prepare.log"
    if folder.sizes() != sizes:
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


def _run(arms: Arms, name: str) -> ArmResult:
    work, sizes = arms.work, arms.sizes
    teacher = [(work.teacher, ["--max-adapters", "0"])]
    if name == "online":
        return arms.stillhouse(
            name, lambda targets: off_policy_spec(work, sizes, targets[0]), services=teacher
        )
    if name == "trl-local":
        return arms.trl(name, "local")
    if name == "trl-server":
        return arms.trl(name, "server", serve=True)
    cache = arms.work.path / "cache"

    def build(targets: Sequence[str]) -> Any:
        spec = off_policy_spec(work, sizes, targets[0], cache=cache, cache_mode="write_through")
        spec.task = "cache"
        return spec

    if not cache.exists():
        arms.say("the cache is built, once, which is none of the cached arm's time")
        built = arms.stillhouse("cache-build", build, services=teacher)
        if built.problem:
            shutil.rmtree(cache, ignore_errors=True)
            return replace(built, name=name)
    return arms.stillhouse(name, lambda _: off_policy_spec(work, sizes, None, cache=cache, cache_mode="only"))


def time_to(result: ArmResult, score: float) -> float | None:
    """Seconds until a student is at least as good as `score`, between kept ones by a straight line; None if none is."""
    before: tuple[float, float] | None = None
    for step in sorted(result.scores):
        seconds, value = result.seconds(step), result.scores[step]
        if seconds is None:
            continue
        if value <= score:
            if before is None or before[1] == value:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - score) / (before[1] - value)
        before = seconds, value
    return None


def ratios_of(results: Sequence[ArmResult]) -> dict[str, float]:
    """Ratios of seconds for equal steps, and to TRL's final scores; above 1 where Stillhouse takes less."""
    arm = {each.name: each for each in results}
    found: dict[str, float] = {}
    for ours in ("online", "cached"):
        for theirs in ("trl-local", "trl-server"):
            if ours not in arm or theirs not in arm:
                continue
            shared = set(arm[ours].steps) & set(arm[theirs].steps)
            own, other = (each.seconds(max(shared, default=-1)) for each in (arm[ours], arm[theirs]))
            if own and other:
                found[f"{theirs}_over_{ours}_seconds_at_equal_steps"] = other / own
            scores = arm[theirs].scores
            final = scores.get(max(scores, default=-1))
            reached, taken = (
                (None, None) if final is None else (time_to(arm[ours], final), time_to(arm[theirs], final))
            )
            if reached and taken:
                found[f"{theirs}_over_{ours}_seconds_to_its_final_kl"] = taken / reached
    if {"online", "cached"} <= arm.keys():
        online, cached = (arm[name].seconds() for name in ("online", "cached"))
        if online and cached and arm["online"].last_step == arm["cached"].last_step:
            found["online_over_cached_seconds"] = online / cached
    return found


def _tokens(arms: Arms, steps: int) -> int:
    """Tokens that the first steps train on."""
    rows = json.loads(arms.work.rows.read_text())[: steps * arms.sizes.batch]
    return sum(sum(row["mask"]) for row in rows)


def _report(console: Console, results: Sequence[ArmResult], arms: Arms) -> None:
    columns = ("arm", "steps", "seconds", "tokens/s", "process s", "peak MiB of each process", "problem")
    table = Table(*columns, title="Time of equal steps, after start-up")
    for each in results:
        seconds = each.seconds()
        table.add_row(
            each.name,
            str(each.last_step),
            f"{seconds:.1f}" if seconds else "n/a",
            f"{_tokens(arms, each.last_step) / seconds:.0f}" if seconds else "n/a",
            f"{each.process_s:.1f}",
            ", ".join(f"{name} {mib:.0f}" for name, mib in each.memory_mib[:6]),
            each.problem,
        )
    console.print(table)
    steps = sorted({step for each in results for step in each.scores})
    scores = Table(
        "arm", *map(str, steps), title="KL(teacher || student) on held-out texts by step, nats per token"
    )
    for each in results:
        scores.add_row(
            each.name, *(f"{each.scores[step]:.4f}" if step in each.scores else "" for step in steps)
        )
    console.print(scores)
    for name, value in ratios_of(results).items():
        console.print(f"{name}: {value:.2f}")


def _write(json_file: Path | None, results: Sequence[ArmResult], arms: Arms) -> None:
    if json_file is not None:
        content = {
            **ratios_of(results),
            "sizes": asdict(arms.sizes),
            "arms": [each.to_json() for each in results],
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
