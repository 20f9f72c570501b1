"""Distillation of a teacher that is trained on the spot: Stillhouse online, and TRL with full logits where its Python is handed over."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.end_to_end.arms import ArmResult, Arms
from benchmarks.end_to_end.processes import run_process, tail
from benchmarks.end_to_end.runs import off_policy_spec
from benchmarks.end_to_end.sizes import DEFAULT, Sizes, Work

SIZES = {
    "full": replace(
        DEFAULT,
        teacher_hidden=768,
        teacher_layers=12,
        student_hidden=384,
        student_layers=4,
        heads=12,
        teacher_steps=150,
        warm_steps=1,
        batch=32,
        learning_rate=1e-3,
        steps=64,
    ),
    "small": replace(
        DEFAULT,
        teacher_hidden=64,
        teacher_layers=2,
        student_hidden=64,
        student_layers=1,
        heads=2,
        teacher_steps=20,
        warm_steps=1,
        steps=8,
        batch=4,
    ),
}
"""The larger teacher has about 90 million weights."""
LIMIT_S = 300.0


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--size", type=click.Choice(list(SIZES)), required=True)
@click.option("--trl-python", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
def main(*, work: Path, size: str, trl_python: Path | None, json_file: Path) -> None:
    """Distil, and score the students."""
    sizes, folder = SIZES[size], Work(work.resolve())
    log = folder.path.parent / "distil-prepare.log"
    command: list[object] = [sys.executable, "-m", "benchmarks.end_to_end.prepare", folder.path]
    code, _ = run_process([*command, json.dumps(asdict(sizes))], log=log, limit_s=LIMIT_S)
    if code != 0:
        raise click.ClickException(f"teacher and data could not be made: {tail(log)}")
    arms = Arms(work=folder, sizes=sizes, peers=trl_python, minutes=3.0, say=click.echo)
    services = [(folder.teacher, ["--max-adapters", "0", "--gpu-memory-utilization", "0.3"])]
    results = [
        arms.stillhouse(
            "online", lambda targets: off_policy_spec(folder, sizes, targets[0]), services=services
        )
    ]
    if trl_python is not None:
        results.append(arms.trl("trl-local", "local"))
    arms.score("forward", results)
    json_file.write_text(json.dumps(_content(folder, sizes, results), indent=2) + "\n")


def _content(folder: Work, sizes: Sizes, results: list[ArmResult]) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(folder.teacher / "model.safetensors", framework="pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return {
        "sizes": asdict(sizes),
        "teacher_parameters": sum(_product(shape) for shape in shapes),
        "arms": [each.to_json() for each in results],
    }


def _product(shape: list[int]) -> int:
    total = 1
    for each in shape:
        total *= each
    return total


if __name__ == "__main__":
    main()
