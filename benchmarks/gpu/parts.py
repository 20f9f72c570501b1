"""Parts of the check: the process of each, its limit of time, and the lines that its results become.

A part has two sizes: "full" for a GPU, and "small" for a CPU, where it shows that everything runs and no speed of a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Size = Literal["full", "small"]
CONFORMANCE_MODULE, TEACHER_MODULE = "benchmarks.gpu.conformance", "benchmarks.teacher"
STUDENT_MODULE, DISTIL_MODULE = "benchmarks.student", "benchmarks.gpu.distil"


@dataclass(frozen=True, kw_only=True, slots=True)
class Handed:
    """Models and packages that the caller brings along."""

    work: Path
    """Folder of models and logs."""
    model: Path | None = None
    """Model for the conformance; a random one is made without."""
    peers: Path | None = None
    """Folder of packages with TRL and Liger, as `pip install --no-deps --target` leaves it."""
    trl_python: Path | None = None
    """Python of an environment with TRL, for the distillation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A process that writes its results as JSON."""

    name: str
    title: str
    limit_s: float
    arguments: Callable[[Size, Handed], Sequence[object]]
    """Arguments of Python, but for the file of results."""
    lines: Callable[[Mapping[str, Any]], Sequence[tuple[str, str]]]
    """(what, figure) of the results."""
    is_large: bool = False
    """A part that a CPU takes many minutes for; its small form runs where it is named."""

    def command(self, size: Size, handed: Handed, json_file: Path) -> list[object]:
        """The whole command."""
        return [sys.executable, "-m", *self.arguments(size, handed), "--json", json_file]


def _conformance(size: Size, handed: Handed) -> Sequence[object]:
    model = ["--model", handed.model] if handed.model else []
    return [CONFORMANCE_MODULE, "--work", handed.work, "--rows", 24 if size == "full" else 4, *model]


def _conformance_lines(found: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return [
        (
            f"served in {dtype}, {each['engine']}",
            each.get("problem")
            or f"largest error {each['largest']:.2e} nats, KL {each['kl']:.1e}, top-1 {each['top_1']:.2%} "
            f"(transformers in {dtype}: {each['largest_of_transformers']:.2e}, {each['kl_of_transformers']:.1e}, "
            f"{each['top_1_of_transformers']:.2%})",
        )
        for dtype, each in found["dtypes"].items()
    ]


def _teacher(model: str, minutes: float) -> Callable[[Size, Handed], Sequence[object]]:
    generation = "gen_topk_vs_plain_k64" if model == "small" else f"gen_topk_vs_plain_{model}_k64"
    names = f"score_vs_engine_{model}_k64,{generation}"

    def arguments(size: Size, handed: Handed) -> Sequence[object]:  # noqa: ARG001 (the same for all parts)
        small = ["--scale", 0.25, "--rounds", 1] if size == "small" else ["--rounds", 3]
        return [TEACHER_MODULE, "--models", model, "--only", names, "--minutes", minutes, *small]

    return arguments


def _teacher_lines(found: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    lines = [(name, _figure(value)) for name, value in found.items() if name != "details"]
    for model, each in found["details"]["models"].items():
        for name in each["rounds"][-1] if each["rounds"] else ():
            rates = [
                taken[name]["tokens"] / taken[name]["seconds"] for taken in each["rounds"] if name in taken
            ]
            lines.append((f"{model}, {name}, {each['engine']}", f"{max(rates):,.0f} tokens/s"))
    return lines


def _student(size: Size, handed: Handed) -> Sequence[object]:
    peers: list[object] = ["--peers-dir", handed.peers] if handed.peers else []
    methods = ["full", "ours", *(["trl_async", "trl_gkd", "liger_jsd"] if handed.peers else [])]
    sizes: list[object] = [
        "--steps",
        2,
        "--rounds",
        1,
        "--vocabulary",
        8192,
        "--sequences",
        1,
        "--chunk",
        128,
    ]
    if size == "full":
        sizes = ["--device", "cuda", "--hidden", 1536, "--heads", 12, "--sequences", 16, "--rounds", 1]
        sizes += [part for chunk in (512, 1024, 2048) for part in ("--chunk", chunk)]
    only = [part for method in methods for part in ("--only", method)]
    return [STUDENT_MODULE, "--no-install", *sizes, *peers, *only]


def _student_lines(found: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    lines = [
        (f"step, {name}", f"{each['seconds']:.3f} s, {each['memory_mib']:,.0f} MiB")
        for name, each in found["details"]["passes"].items()
    ]
    missing = [(f"step, {name}", why) for name, why in found["details"]["not_available"].items()]
    return lines + missing + [(name, _figure(value)) for name, value in found.items() if name != "details"]


def _distil(size: Size, handed: Handed) -> Sequence[object]:
    trl = ["--trl-python", handed.trl_python] if handed.trl_python else []
    return [DISTIL_MODULE, "--work", handed.work / "distilled", "--size", size, *trl]


def _distil_lines(found: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return [
        (
            f"{arm['name']}, a teacher of {found['teacher_parameters'] / 1e6:.0f} M",
            arm["problem"]
            or f"{arm['seconds']:.1f} s for {arm['last_step']} steps; held-out KL {_scores(arm['scores'])}",
        )
        for arm in found["arms"]
    ]


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.4f} at step {step}" for step, value in scores.items()) or "n/a"


def _figure(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


PARTS = (
    Part(
        name="conformance",
        title="served against transformers in float32",
        limit_s=120.0,
        arguments=_conformance,
        lines=_conformance_lines,
    ),
    Part(
        name="small",
        title="engine's limit: a model so small that all else counts",
        limit_s=90.0,
        arguments=_teacher("small", 0.5),
        lines=_teacher_lines,
    ),
    Part(
        name="qwen",
        title="shape of 0.5B",
        limit_s=100.0,
        arguments=_teacher("qwen", 0.6),
        lines=_teacher_lines,
        is_large=True,
    ),
    Part(
        name="student",
        title="student's step: width of 1.5B, 8,192 tokens",
        limit_s=70.0,
        arguments=_student,
        lines=_student_lines,
    ),
    Part(
        name="distil",
        title="distillation",
        limit_s=100.0,
        arguments=_distil,
        lines=_distil_lines,
    ),
    Part(
        name="qwen7b",
        title="shape of 7B",
        limit_s=120.0,
        arguments=_teacher("qwen7b", 0.6),
        lines=_teacher_lines,
        is_large=True,
    ),
)
"""In the order in which they run; their limits are ten minutes together."""


def results_of(json_file: Path) -> dict[str, Any] | None:
    """The results that a part wrote; None if it wrote nothing that can be read."""
    try:
        found = json.loads(json_file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
