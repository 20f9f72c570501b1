"""Seconds to equal quality of four ways to distil, side by side: same cores, weights, rows, order, optimiser and steps.

Stillhouse online (teacher and training process, gRPC), Stillhouse from a cache, TRL's GKDTrainer with a teacher in its process
and full logits, and TRL's ServerDistillationTrainer against `vllm serve`, which gets the given texts where it would generate.
Rows are prompts and completions of natural lengths, of which completions are learnt: documented functions of Python's library, or
a JSONL file's. TRL pads a batch to its longest row, as its own collator does. `--rows texts` has rows of equal length without
padding or prompts. Seconds count from the first step on, start-up apart; every student is scored afterwards with the teacher's whole
distributions. Where equal steps leave Stillhouse a little behind, seconds to a score are those of a run with a tenth more steps. An
interrupted comparison prints what it has.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
from rich.table import Table

from benchmarks.end_to_end.arms import ArmResult, Arms
from benchmarks.end_to_end.driver import (
    Comparison,
    Outcome,
    compare,
    comparison_options,
    memory_text,
    take_sizes,
)
from benchmarks.end_to_end.processes import halves_of_cores
from benchmarks.end_to_end.runs import off_policy_spec
from benchmarks.end_to_end.sizes import Sizes

ARMS = ("online", "online-longer", "cached", "trl-local", "trl-server")
LONGER_ARM, LONGER = "online-longer", 1.1
"""The online arm with a tenth more steps, by which it may reach a score that it misses by a little at equal steps."""
LOCAL_ARM = "trl-local"
"""Teacher and student in one process, which two hosts cannot share."""
STEPS = 24
"""All arms take so many in reasonable time with that vocabulary."""
KEPT = 4
"""Students of a run that are kept: few, since writing them is a part of its time."""


@click.command()
@comparison_options(work=".bench/end-to-end", arms=ARMS, minutes=4.0, steps=STEPS)
@click.option("--length", default=256, show_default=True, help="Longest row, in tokens.")
@click.option(
    "--apart",
    is_flag=True,
    help=f"Half of the cores for the student and half for services, as on two hosts; without {LOCAL_ARM}.",
)
def main(*, length: int, apart: bool, **options: Any) -> None:
    """Compare ways to distil by their time to equal quality."""
    sizes = Sizes(**take_sizes(options), length=length, apart=apart, kept=KEPT)
    arms: tuple[str, ...] = ARMS
    if apart:
        if LOCAL_ARM in options["chosen"]:
            raise click.UsageError(f"{LOCAL_ARM} has one process for both models; leave it out with --apart.")
        arms = tuple(each for each in ARMS if each not in {LOCAL_ARM, LONGER_ARM})
        try:
            halves_of_cores()
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    comparison = Comparison(arms=arms, direction="forward", ratios=ratios_of, tables=_tables)
    compare(comparison, _run, sizes, **options)


def _run(arms: Arms, name: str) -> ArmResult:
    if name == LONGER_ARM:
        arms = replace(arms, sizes=replace(arms.sizes, steps=math.ceil(LONGER * arms.sizes.steps)))
    work, sizes = arms.work, arms.sizes
    teacher = [(work.teacher, ["--max-adapters", "0"])]
    if name in {"online", LONGER_ARM}:
        return arms.stillhouse(
            name, lambda targets: off_policy_spec(work, sizes, targets[0]), services=teacher
        )
    if name == "trl-local":
        return arms.trl(name, "local")
    if name == "trl-server":
        return arms.trl(name, "server", serve=True)
    cache = work.cache(sizes)
    done = cache.with_suffix(".done")

    def build(targets: Sequence[str]) -> Any:
        spec = off_policy_spec(work, sizes, targets[0], cache=cache, cache_mode="write_through")
        spec.task = "cache"
        return spec

    if not done.exists():
        shutil.rmtree(cache, ignore_errors=True)
        arms.say("the cache is built, once, which is none of the cached arm's time")
        built = arms.stillhouse("cache-build", build, services=teacher)
        if built.problem:
            return replace(built, name=name)
        done.touch()
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
            own, other = (each.cpu_s_a_step for each in (arm[ours], arm[theirs]))
            if own and other:
                found[f"{theirs}_over_{ours}_processor_seconds_a_step"] = other / own
            scores = arm[theirs].scores
            final = scores.get(max(scores, default=-1))
            if final is None:
                continue
            runs = [arm[name] for name in (ours, f"{ours}-longer") if name in arm]
            reached = next(filter(None, (time_to(each, final) for each in runs)), None)
            taken = time_to(arm[theirs], final)
            if reached and taken:
                found[f"{theirs}_over_{ours}_seconds_to_its_final_kl"] = taken / reached
    if {"online", "cached"} <= arm.keys():
        online, cached = (arm[name].seconds() for name in ("online", "cached"))
        if online and cached and arm["online"].last_step == arm["cached"].last_step:
            found["online_over_cached_seconds"] = online / cached
    return found


def _shape(arms: Arms) -> str:
    """The mean row of the run, and the mean row of TRL's padded batches."""
    rows, batch = json.loads(arms.work.rows.read_text()), arms.sizes.batch
    lengths = [len(row["token_ids"]) for row in rows]
    padded = [max(lengths[first : first + batch]) for first in range(0, len(rows), batch)]
    learnt = sum(sum(row["mask"]) for row in rows)
    hosts = "half of the cores for the student and half for services, " if arms.sizes.apart else ""
    return (
        f"{hosts}{arms.sizes.precision}, vocabulary {arms.sizes.vocabulary:,}, rows of {sum(lengths) / len(rows):.0f} tokens on average, {learnt / len(rows):.0f} of "
        f"them learnt, batches of {batch} padded to {sum(padded) / len(padded):.0f}"
    )


def _tables(outcome: Outcome) -> Sequence[Table]:
    results, columns = outcome.results, ("arm", "steps", "seconds", "tokens/s", "process s", "CPU s a step")
    times = Table(
        *columns,
        "peak MiB of each process",
        "problem",
        title=f"Time of equal steps, after start-up; {_shape(outcome.arms)}",
    )
    rows, batch = json.loads(outcome.arms.work.rows.read_text()), outcome.arms.sizes.batch
    for each in results:
        seconds = each.seconds()
        learnt = sum(sum(row["mask"]) for row in (rows + rows)[: each.last_step * batch])
        times.add_row(
            each.name,
            str(each.last_step),
            f"{seconds:.1f}" if seconds else "n/a",
            f"{learnt / seconds:.0f}" if seconds else "n/a",
            f"{each.process_s:.1f}",
            f"{each.cpu_s_a_step:.2f}" if each.cpu_s_a_step else "n/a",
            memory_text(each),
            each.problem,
        )
    steps = sorted({step for each in results for step in each.scores})
    scores = Table(
        "arm", *map(str, steps), title="KL(teacher || student) on held-out texts by step, nats per token"
    )
    for each in results:
        scores.add_row(
            each.name, *(f"{each.scores[step]:.4f}" if step in each.scores else "" for step in steps)
        )
    return times, scores


if __name__ == "__main__":
    main()
