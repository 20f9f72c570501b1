"""Updates a minute and tokens of rollouts a second, beside TRL's trainers on the same student, prompts and lengths.

Stillhouse samples in the training process, or through one or two rollout services (which write with a LoRA adapter); TRL's
DistillationTrainer and GKDTrainer generate with transformers, and hold the teacher in their process. All minimise the reverse
KL on one text a prompt. Prompts are heads of functions of Python's library, and a text ends where the student ends it, or at
its longest; `--rows texts` has prompts and texts of one length. Seconds count from the first update on. A rollout service is
idle while no text is in its engine: while it waits for weights or prompts, or another one still writes. With `--batch 4`
writing is two thirds of an update's processor time, for arms of two services. Each student is scored
after the same updates by the reverse KL on what it writes behind held-out prompts. An interrupted comparison prints what it has.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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
from benchmarks.end_to_end.runs import on_policy_spec
from benchmarks.end_to_end.sizes import Sizes
from benchmarks.on_policy.idle import IdleShare, free_port
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.telemetry.pace import Pace, pace_of

ARMS = ("local", "trl-distillation", "trl-gkd", "local-lora", "one-service", "two-services", "trl-gkd-lora")
BASELINES = {
    "local": ("trl-distillation", "trl-gkd"),
    "local-lora": ("trl-gkd-lora",),
    "one-service": ("trl-gkd-lora",),
    "two-services": ("trl-gkd-lora",),
}
"""TRL's arms that train the same weights as an arm of Stillhouse."""


@click.command()
@comparison_options(work=".bench/on-policy", arms=ARMS, minutes=4.0, steps=32)
@click.option("--staleness", type=int, help="max_staleness of Stillhouse's arms; the default if not given.")
@click.option("--new-tokens", default=192, show_default=True, help="Longest text.")
@click.option("--prompt-tokens", default=96, show_default=True, help="Longest prompt.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    help="Seeds of each arm, whose scores are averaged; those but the first that an earlier call has run are not run again.",
)
def main(
    *,
    staleness: int | None,
    new_tokens: int,
    prompt_tokens: int,
    learning_rate: float,
    seeds: int,
    **options: Any,
) -> None:
    """Compare on-policy training by its speed and by equal updates."""
    sizes = Sizes(
        **take_sizes(options),
        learning_rate=learning_rate,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        length=prompt_tokens + new_tokens,
        seeds=seeds,
        on_policy=True,
        warm_steps=100,
        # Checkpoints are rare in a run: one half-way, and one at the end.
        kept=2,
    )
    comparison = Comparison(
        arms=ARMS, direction="reverse", ratios=ratios_of, tables=_tables, scores_start=True
    )
    compare(comparison, partial(_run, staleness=staleness), sizes, **options)


def _run(arms: Arms, name: str, staleness: int | None) -> ArmResult:
    """An arm with the first seed, and with the others."""
    result = _run_once(arms, name, staleness)
    for seed in range(1, arms.sizes.seeds):
        seeded = replace(arms, sizes=replace(arms.sizes, seed=seed))
        other = seeded.earlier(name)
        if other is None:
            other = _run_once(seeded, name, staleness)
            seeded.keep(other)
        result.others.append(replace(other, name=f"{name}, seed {seed}"))
    return result


def _run_once(arms: Arms, name: str, staleness: int | None) -> ArmResult:
    if name.startswith("trl-"):
        return arms.trl(name, name.removeprefix("trl-"))
    work, sizes = arms.work, arms.sizes
    writers = {"one-service": 1, "two-services": 2}.get(name, 0)
    ports = [free_port() for _ in range(writers)]
    services = [
        (work.teacher, ["--max-adapters", "0"]),
        *((work.warm_student, ["--max-adapters", "2", "--metrics-port", str(port)]) for port in ports),
    ]
    idle = IdleShare()

    def spec(targets: Sequence[str]) -> RunSpec:
        found = on_policy_spec(work, sizes, targets[0], services=targets[1:], lora=name != "local")
        if staleness is not None:
            found.contexts[0].student.max_staleness = staleness
        return found

    result = arms.stillhouse(name, spec, services=services, watch=lambda _: idle.watch(ports))
    for number, share in enumerate(idle.shares()):
        result.metrics[f"idle_share_{number}"] = share
    return result


def ratios_of(results: Sequence[ArmResult]) -> dict[str, float]:
    """Updates a minute of each arm over those of TRL's arms with the same weights, and the differences of final scores."""
    arm = {each.name: each for each in results}
    found: dict[str, float] = {}
    for ours, others in BASELINES.items():
        for theirs in others:
            if ours not in arm or theirs not in arm:
                continue
            own, other = (_rate(arm[name]) for name in (ours, theirs))
            if own and other:
                found[f"{ours}_over_{theirs}_updates_a_minute"] = own / other
            pairs = list(zip(*([each, *each.others] for each in (arm[ours], arm[theirs])), strict=False))
            gaps = [gap for own, other in pairs if (gap := _gap(own, other)) is not None]
            if gaps:
                found[f"{ours}_minus_{theirs}_reverse_kl"] = statistics.fmean(gaps)
            if len(gaps) > 1:
                found[f"{ours}_minus_{theirs}_reverse_kl_standard_error"] = (
                    statistics.stdev(gaps) / len(gaps) ** 0.5
                )
    return found


def _gap(own: ArmResult, other: ArmResult) -> float | None:
    """Difference of the scores after the last equal updates of two runs of one seed."""
    last = max(own.scores.keys() & other.scores.keys(), default=None)
    return None if last is None else own.scores[last] - other.scores[last]


def _rate(result: ArmResult) -> float | None:
    """Updates a minute."""
    seconds = result.seconds()
    return 60 * result.last_step / seconds if seconds else None


def _tables(outcome: Outcome) -> Sequence[Table]:
    columns = (
        *("arm", "updates", "updates/min", "s of the first two", "CPU s an update", "reverse KL"),
        *("tokens of a text", "idle share", "staleness", "s of an update for texts, teacher, training"),
        *("peak MiB of each process", "problem"),
    )
    arms = outcome.arms
    rows = json.loads(arms.work.prompt_rows(arms.sizes).read_text())
    prompts = _spread([row["num_prompt"] for row in rows])
    table = Table(
        *columns,
        title=f"Updates after start-up; {arms.sizes.precision}, vocabulary {arms.sizes.vocabulary:,}, {arms.sizes.batch} texts of at most "
        f"{arms.sizes.new_tokens} tokens behind prompts of {prompts} (mean, standard deviation)",
    )
    if 0 in outcome.start.scores:
        start = outcome.start
        table.add_row("before", "0", "", "", "", f"{start.scores[0]:.4f}", _spread(start.text_tokens))
    for each in outcome.results:
        rate, final = _rate(each), _final(each)
        idle = [value for name, value in each.metrics.items() if name.startswith("idle_share")]
        first = each.seconds(2)
        table.add_row(
            each.name,
            str(each.last_step),
            f"{rate:.1f}" if rate else "n/a",
            f"{first:.1f}" if first else "n/a",
            f"{each.cpu_s_a_step:.2f}" if each.cpu_s_a_step else "n/a",
            final,
            _spread(each.text_tokens),
            ", ".join(f"{share:.0%}" for share in idle),
            f"{each.metrics['train/rollout_staleness']:.2f}"
            if "train/rollout_staleness" in each.metrics
            else "",
            _times(each),
            memory_text(each),
            each.problem,
        )
    advice = [
        f"{each.name}: {pace.advice}" for each in outcome.results if (pace := _pace(each)) and pace.advice
    ]
    table.caption = "\n".join(advice)
    return (table,)


def _pace(result: ArmResult) -> Pace | None:
    """Mean times of an update of Stillhouse's arms."""
    return pace_of({name: [value] for name, value in result.metrics.items()})


def _times(result: ArmResult) -> str:
    pace = _pace(result)
    return "" if pace is None else f"{pace.texts_s:.2f}, {pace.teacher_s:.2f}, {pace.training_s:.2f}"


def _spread(lengths: Sequence[int]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(lengths):.0f} ± {statistics.pstdev(lengths):.0f}" if lengths else ""


def _final(result: ArmResult) -> str:
    """The last score of each seed."""
    found = [each.scores[max(each.scores)] for each in (result, *result.others) if each.scores]
    return ", ".join(f"{score:.4f}" for score in found) or "n/a"


if __name__ == "__main__":
    main()
