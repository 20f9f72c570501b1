"""Updates a minute and tokens of rollouts a second, beside TRL's trainers on the same student, prompts and lengths.

Stillhouse samples in the training process, or through one or two rollout services (which write with a LoRA adapter); TRL's
DistillationTrainer and GKDTrainer generate with transformers, and hold the teacher in their process. All minimise the reverse
KL on one text a prompt. Seconds count from the first update on. Each student is scored after the same updates by the reverse
KL on what it writes behind held-out prompts. An interrupted comparison prints what it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import click
from rich.table import Table

from benchmarks.end_to_end.arms import ArmResult, Arms
from benchmarks.end_to_end.driver import Comparison, Outcome, compare, comparison_options, memory_text
from benchmarks.end_to_end.runs import on_policy_spec
from benchmarks.end_to_end.sizes import Sizes
from benchmarks.on_policy.idle import IdleShare, free_port
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

ARMS = ("local", "trl-distillation", "trl-gkd", "local-lora", "one-service", "two-services", "trl-gkd-lora")
BASELINES = {
    "local": ("trl-distillation", "trl-gkd"),
    "local-lora": ("trl-gkd-lora",),
    "one-service": ("trl-gkd-lora",),
    "two-services": ("trl-gkd-lora",),
}
"""TRL's arms that train the same weights as an arm of Stillhouse."""


@click.command()
@comparison_options(work=".bench/on-policy", arms=ARMS, minutes=2.5)
@click.option("--staleness", type=int, help="max_staleness of Stillhouse's arms; the default if not given.")
@click.option("--steps", default=40, show_default=True, help="Updates.")
@click.option("--batch", default=16, show_default=True, help="Texts of an update.")
@click.option("--new-tokens", default=64, show_default=True, help="Longest text.")
@click.option("--prompt-tokens", default=16, show_default=True)
@click.option("--teacher-steps", default=300, show_default=True, help="Training of the teacher.")
@click.option("--learning-rate", default=1e-3, show_default=True)
def main(
    *,
    staleness: int | None,
    steps: int,
    batch: int,
    new_tokens: int,
    prompt_tokens: int,
    teacher_steps: int,
    learning_rate: float,
    **options: Any,
) -> None:
    """Compare on-policy training by its speed and by equal updates."""
    sizes = Sizes(
        steps=steps,
        batch=batch,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        teacher_steps=teacher_steps,
        learning_rate=learning_rate,
        # Checkpoints are rare in a run: one half-way, and one at the end.
        kept=2,
    )
    comparison = Comparison(
        arms=ARMS, direction="reverse", ratios=ratios_of, tables=_tables, scores_start=True
    )
    compare(comparison, partial(_run, staleness=staleness), sizes, **options)


def _run(arms: Arms, name: str, staleness: int | None) -> ArmResult:
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
            shared = set(arm[ours].scores) & set(arm[theirs].scores)
            if shared:
                last = max(shared)
                found[f"{ours}_minus_{theirs}_reverse_kl"] = arm[ours].scores[last] - arm[theirs].scores[last]
    return found


def _rate(result: ArmResult) -> float | None:
    """Updates a minute."""
    seconds = result.seconds()
    return 60 * result.last_step / seconds if seconds else None


def _tables(outcome: Outcome) -> Sequence[Table]:
    columns = (
        *("arm", "updates", "updates/min", "text tokens/s at most", "reverse KL", "idle share", "staleness"),
        *("peak MiB of each process", "problem"),
    )
    table = Table(*columns, title="Updates, after start-up; a text has at most the tokens asked for")
    if 0 in outcome.start.scores:
        table.add_row("before", "0", "", "", f"{outcome.start.scores[0]:.4f}")
    per_update = outcome.arms.sizes.batch * outcome.arms.sizes.new_tokens
    for each in outcome.results:
        rate, final = _rate(each), each.scores.get(max(each.scores, default=-1))
        idle = [value for name, value in each.metrics.items() if name.startswith("idle_share")]
        tokens = each.metrics.get("train/trained_tokens", per_update * each.last_step)
        table.add_row(
            each.name,
            str(each.last_step),
            f"{rate:.1f}" if rate else "n/a",
            f"{tokens / (each.seconds() or 1):.0f}" if rate else "n/a",
            "n/a" if final is None else f"{final:.4f}",
            ", ".join(f"{share:.0%}" for share in idle),
            f"{each.metrics['train/rollout_staleness']:.2f}"
            if "train/rollout_staleness" in each.metrics
            else "",
            memory_text(each),
            each.problem,
        )
    return (table,)


if __name__ == "__main__":
    main()
