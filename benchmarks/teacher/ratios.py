"""Ratios of the teacher's benchmark: both sides, their computation from passes, and the table and file of results.

A ratio is the median over rounds of the ratio within each round: disturbances of the machine affect both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from benchmarks.teacher.timed_pass import Pass

Round = Mapping[str, Pass]
"""Pass by name, without its model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Our rate over another's, or another's bytes or the teacher's processor time over ours: larger is better."""

    name: str
    model: str
    ours: str
    """Name of our pass."""
    other: str
    """Name of the other's."""
    required: float | None = None
    """Required ratio; None for a comparison only."""
    stretch: float | None = None
    of: Literal["rate", "bytes", "teacher_cpu"] = "rate"
    limit: Literal["", "score", "shared", "decode"] = ""
    """Bound by the model's parts in PyTorch's kernels; compiled rows and smaller batches may pass it."""

    def value(self, passes: Round) -> float | None:
        """Ratio of one round; None where a side is missing."""
        ours, other = passes.get(self.ours), passes.get(self.other)
        if ours is None or other is None:
            return None
        if self.of == "rate":
            return ours.tokens_per_s / other.tokens_per_s
        return self.size(other) / self.size(ours)

    def size(self, taken: Pass) -> float:
        """A side's figure, in `UNITS`."""
        if self.of == "bytes":
            return taken.bytes_per_token
        return taken.tokens_per_s if self.of == "rate" else taken.teacher_us_per_token


UNITS = {"rate": " tok/s", "bytes": " B/tok", "teacher_cpu": " us/tok"}


RATIOS = (
    Ratio(
        name="score_vs_engine_small_k64",
        model="small",
        ours="score_k64",
        other="engine",
        required=0.65,
        stretch=0.7,
        limit="score",
    ),
    Ratio(
        name="score_vs_engine_qwen_k64",
        model="qwen",
        ours="score_k64",
        other="engine",
        required=0.72,
        stretch=0.75,
        limit="score",
    ),
    Ratio(
        name="score_shared_vs_engine_qwen_k64",
        model="qwen",
        ours="shared_k64",
        other="engine_shared",
        required=1.5,
        stretch=2.0,
        limit="shared",
    ),
    Ratio(
        name="score_vs_http_k64",
        model="small",
        ours="score_k64",
        other="http_k64",
        required=10.0,
        stretch=12.0,
    ),
    Ratio(
        name="score_vs_http_k128",
        model="small",
        ours="score_k128",
        other="http_k128",
        required=16.0,
        stretch=18.0,
    ),
    Ratio(
        name="score_vs_trl_k64", model="small", ours="score_k64", other="trl_k64", required=10.0, stretch=12.0
    ),
    Ratio(
        name="score_vs_trl_k128",
        model="small",
        ours="score_k128",
        other="trl_k128",
        required=16.0,
        stretch=20.0,
    ),
    Ratio(
        name="score_vs_vllm_grpc_k64",
        model="small",
        ours="score_k64",
        other="vllm_grpc_k64",
        required=4.0,
        stretch=5.0,
    ),
    Ratio(
        name="gen_topk_vs_plain_k64",
        model="small",
        ours="gen_k64",
        other="gen_plain",
        required=0.9,
        stretch=0.95,
        limit="decode",
    ),
    Ratio(
        name="gen_vs_http_k64", model="small", ours="gen_k64", other="gen_http_k64", required=2.0, stretch=2.5
    ),
    Ratio(
        name="gen_vs_vllm_grpc_k64",
        model="small",
        ours="gen_k64",
        other="gen_vllm_grpc_k64",
        required=1.3,
        stretch=1.5,
    ),
    Ratio(
        name="bytes_http_over_ours_k64",
        model="wide",
        ours="score_packed_k64",
        other="http_k64",
        required=16.5,
        stretch=18.0,
        of="bytes",
    ),
    Ratio(
        name="batch_vs_llm_generate",
        model="small",
        ours="batch",
        other="batch_llm",
        required=0.95,
        stretch=1.0,
    ),
    Ratio(
        name="teacher_cpu_k64_over_draws_small",
        model="small",
        ours="score_draws_k16",
        other="score_packed_k64",
        required=0.9,
        stretch=0.95,
        of="teacher_cpu",
    ),
    Ratio(
        name="teacher_cpu_k64_over_draws_wide",
        model="wide",
        ours="score_draws_k16",
        other="score_packed_k64",
        required=0.9,
        stretch=0.95,
        of="teacher_cpu",
    ),
    # Comparisons only.
    Ratio(name="score_draws_vs_k64_small", model="small", ours="score_draws_k16", other="score_packed_k64"),
    Ratio(name="gen_topk_vs_plain_qwen_k64", model="qwen", ours="gen_k64", other="gen_plain", limit="decode"),
    Ratio(name="score_vs_engine_qwen7b_k64", model="qwen7b", ours="score_k64", other="engine", limit="score"),
    Ratio(
        name="gen_topk_vs_plain_qwen7b_k64", model="qwen7b", ours="gen_k64", other="gen_plain", limit="decode"
    ),
    Ratio(name="score_draws_vs_k64_wide", model="wide", ours="score_draws_k16", other="score_packed_k64"),
    Ratio(name="score_vs_engine_small_k20", model="small", ours="score_k20", other="engine", limit="score"),
    Ratio(name="score_vs_engine_small_k128", model="small", ours="score_k128", other="engine", limit="score"),
    Ratio(name="score_vs_engine_all_cores_small_k64", model="small", ours="score_k64", other="engine_all"),
    Ratio(
        name="score_vs_engine_wide_k64", model="wide", ours="score_packed_k64", other="engine", limit="score"
    ),
    Ratio(name="score_vs_http_small_k20", model="small", ours="score_k20", other="http_k20"),
    Ratio(name="score_vs_http_wide_k64", model="wide", ours="score_packed_k64", other="http_k64"),
    Ratio(name="score_vs_http_qwen_k64", model="qwen", ours="score_k64", other="http_k64"),
    Ratio(name="score_shared_vs_http_qwen_k64", model="qwen", ours="shared_k64", other="http_k64"),
    Ratio(name="score_shared_vs_engine_apart_qwen_k64", model="qwen", ours="shared_k64", other="engine"),
    Ratio(name="score_vs_transformers_small_k64", model="small", ours="score_k64", other="transformers_k64"),
    Ratio(
        name="score_vs_transformers_wide_k64",
        model="wide",
        ours="score_packed_k64",
        other="transformers_k64",
    ),
    Ratio(name="score_vs_transformers_qwen_k64", model="qwen", ours="score_k64", other="transformers_k64"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds per token of a model's parts in torch alone, with as many threads as the engine."""

    body: float
    head: float
    select: Mapping[int, float]
    """Top-k and log-sum-exp, by k."""
    helpers: int = 0
    """Helper threads that compute in score-only steps, and that select rows of generated tokens."""

    def answer(self, top_k: int) -> float:
        """Seconds of one thread for the rows of one token: output layer and selection."""
        return self.head + self.select[top_k]

    def score_rate(self, top_k: int) -> float:
        """Roofline: tokens per second of body, output layer and selection."""
        return (1 + self.helpers) / (self.body + self.answer(top_k))

    def limit(self, kind: str, top_k: int, *, computed: float, answered: float) -> float | None:
        """Bound of a ratio by the parts; `computed` and `answered` are shares of shared sequences."""
        answer, threads = self.answer(top_k), 1 + self.helpers
        if kind == "score":
            return self.body * threads / (self.body + answer)
        if kind == "shared":
            return self.body * computed * threads / (self.body * computed + answer * answered)
        if kind == "decode":
            # A helper selects beside later steps; a step takes one thread.
            step = self.body + self.head
            return step / max(step, (step + self.select[top_k]) / threads)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelResult:
    """All rounds of one model."""

    rounds: Sequence[Round]
    costs: Costs | None
    computed: float
    """Share of the tokens of shared sequences that a prefix cache leaves to compute."""
    answered: float
    """Share of them with a response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioResult:
    """One ratio over all rounds."""

    ratio: Ratio
    values: tuple[float, ...]
    ours: float
    """Median of the figure, in the ratio's unit."""
    other: float
    roofline: float | None
    limit: float | None

    @property
    def median(self) -> float:
        """Median ratio."""
        return statistics.median(self.values)


def ratio_result(ratio: Ratio, result: ModelResult) -> RatioResult | None:
    """Result of a ratio over rounds; None where a side could not run."""
    values, ours, other = [], [], []
    for passes in result.rounds:
        value = ratio.value(passes)
        if value is not None:
            values.append(value)
            ours.append(ratio.size(passes[ratio.ours]))
            other.append(ratio.size(passes[ratio.other]))
    if not values:
        return None
    top_k = top_k_of(ratio.ours)
    costs = result.costs if top_k else None
    scores = ratio.of == "rate" and ratio.ours.startswith(("score", "shared"))
    return RatioResult(
        ratio=ratio,
        values=tuple(values),
        ours=statistics.median(ours),
        other=statistics.median(other),
        roofline=costs.score_rate(top_k) if costs and scores else None,
        limit=costs.limit(ratio.limit, top_k, computed=result.computed, answered=result.answered)
        if costs
        else None,
    )


def top_k_of(name: str) -> int:
    """The k in the name of a pass; 0 without one."""
    tail = name.rpartition("_k")[2]
    return int(tail) if tail.isdigit() else 0


def as_json(outcomes: Mapping[str, RatioResult | None], details: Mapping[str, Any]) -> dict[str, Any]:
    """Every ratio under its name, "n/a" where a peer cannot run; measurements under "details"."""
    ratios = {name: "n/a" if each is None else each.median for name, each in outcomes.items()}
    return {**ratios, "details": dict(details)}


def table(outcomes: Mapping[str, RatioResult | None], title: str) -> Table:
    """One row per ratio: median, minimum and maximum over rounds, both sides, roofline of the same run."""
    shown = Table(title=title)
    shown.add_column("ratio")
    for column in ("value", "rounds", "required", "ours", "other's", "roofline", "limit"):
        shown.add_column(column, justify="right")
    for name, each in outcomes.items():
        if each is None:
            shown.add_row(name, "n/a")
            continue
        required = each.ratio.required
        unit = UNITS[each.ratio.of]
        value = f"{each.median:.2f}"
        if required is not None:
            value += " ok" if each.median >= required else " below"
        shown.add_row(
            name,
            value,
            f"{min(each.values):.2f} to {max(each.values):.2f}",
            "" if required is None else f"{required:g} ({each.ratio.stretch:g})",
            f"{each.ours:,.0f}{unit}",
            f"{each.other:,.0f}{unit}",
            "" if each.roofline is None else f"{each.roofline:,.0f} tok/s",
            "" if each.limit is None else f"{each.limit:.2f}",
        )
    return shown
