"""Plan of a request for vLLM's worker beyond vLLM's own options, and the two arrays that carry its results.

Both ends are processes of one start, so the format has no version.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.distributions.from_logits import non_finite
from stillhouse.teacher_service.distributions.row_tensors import RowTensors
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    Float32Array,
    GenerateInput,
    Int32Array,
    ScoreInput,
)

KEY = "stillhouse"
"""Key in `SamplingParams.extra_args`; requests without it are left to vLLM."""
KEEP_ARRAYS: dict[str, Any] = {KEY: {}}
"""`extra_args` of a request whose rows stay arrays in the front end."""
HELPER_THREADS_VARIABLE = "STILLHOUSE_VLLM_HELPERS"
"""Environment variable with the number of the worker's helper threads (cpu_threads.py)."""
STREAM_INTERVAL_TOKENS = 16
"""Tokens per chunk of a sample, except for its first and last chunk."""
MISSING = -1
"""First id of a row not computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePlan:
    """Rows of a prompt, which is the sequence without its last token."""

    start: int
    """Position that the first row predicts."""
    last: int
    """Token after the prompt, which the last row predicts."""
    options: DistributionOptions
    query_token_ids: Int32Array | None = None

    @classmethod
    def from_input(cls, item: ScoreInput) -> ScorePlan:
        """Builds the plan of one sequence."""
        return cls(
            start=item.start,
            last=int(item.token_ids[-1]),
            options=item.options,
            query_token_ids=item.query_token_ids,
        )

    def to_extra_args(self) -> dict[str, Any]:
        """Serialises to `SamplingParams.extra_args`, in plain values for two serialisers."""
        query = self.query_token_ids
        return {
            KEY: {
                "score": {"start": self.start, "last": self.last},
                "options": _plain(self.options),
                "query": None
                if query is None
                else {"ids": np.ascontiguousarray(query, "<i4").tobytes(), "width": query.shape[1]},
            }
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """Sampling parameters of one sample, and the quantities to report per token."""

    temperature: float
    top_p: float
    top_k: int
    """0 is all."""
    seed: int
    """Fixes each sample together with the number of tokens generated."""
    num_valid: int
    """Ids from here on pad the output layer and are never sampled."""
    options: DistributionOptions | None

    @classmethod
    def from_input(cls, item: GenerateInput, *, seed: int, num_valid: int) -> SamplingPlan:
        """Builds the plan of one sample; `seed` in [0, 2^64)."""
        return cls(
            temperature=item.temperature,
            top_p=item.top_p,
            top_k=item.top_k if item.top_k < num_valid else 0,
            seed=seed,
            num_valid=num_valid,
            options=item.options,
        )

    def to_extra_args(self) -> dict[str, Any]:
        """Serialises to `SamplingParams.extra_args`."""
        draw = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed", "num_valid")}
        return {KEY: {"draw": draw, "options": None if self.options is None else _plain(self.options)}}


def read_plan(extra_args: dict[str, Any] | None) -> ScorePlan | SamplingPlan | None:
    """Parses the plan of a request; None without one."""
    argument = (extra_args or {}).get(KEY) or {}
    given: dict[str, Any] | None = argument.get("options")
    options = None
    if given is not None:
        options = DistributionOptions(**{name: _frozen(each) for name, each in given.items()})
    if "draw" in argument:
        return SamplingPlan(**argument["draw"], options=options)
    if "score" not in argument:
        return None
    query = argument["query"]
    ids = None if query is None else np.frombuffer(query["ids"], "<i4").reshape(-1, query["width"])
    assert options is not None
    return ScorePlan(**argument["score"], options=options, query_token_ids=ids)


def score_start(extra_args: dict[str, Any] | None) -> int | None:
    """First position that a request scores; None if it scores nothing. Parsed separately since it is read often."""
    score = ((extra_args or {}).get(KEY) or {}).get("score")
    return None if score is None else int(score["start"])


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(options: DistributionOptions) -> dict[str, Any]:
    return {name: list(each) if isinstance(each, tuple) else each for name, each in asdict(options).items()}


class PackedRows(NamedTuple):
    """Rows on the way from the worker, as tensors on its device."""

    ids: Tensor
    """INT32 [T, 1 + K + R]: the token itself, the top K, the samples."""
    values: Tensor
    """FLOAT32 [T, 3 + K + ...]: the token's logprob (NaN for non-finite logits), those of the top K, tail, sampling logprob,
    then as requested partitions, entropy, queries, hidden states, samples. The first 1 + K columns are those of vLLM's own
    rows."""
    halves: Tensor
    """FLOAT16 [T, K]: the logprobs of the top K where these are not among the values, else [T, 0]."""


def pack(
    rows: RowTensors, targets: Tensor, sampling_logprobs: Tensor | None = None, *, half: bool = False
) -> PackedRows:
    """Packs rows on their device, with `half` the top K as float16."""
    sampling_T = torch.zeros_like(rows.log_tail) if sampling_logprobs is None else sampling_logprobs
    ids = [targets.int(), rows.token_ids, rows.sampled_token_ids]
    values = [
        rows.target_logprobs.masked_fill(~rows.finite, torch.nan),
        None if half else rows.logprobs,
        rows.log_tail,
        sampling_T,
        rows.log_partitions,
        rows.entropy,
        rows.query_logprobs,
        rows.hidden_states,
        rows.sampled_logprobs,
    ]
    halves = rows.logprobs if half else rows.logprobs[:, :0]
    return PackedRows(_columns(ids), _columns(values), halves.half())


def _columns(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([each.reshape(len(each), -1) for each in parts if each is not None], dim=1)


def column_counts(
    options: DistributionOptions | None, *, vocab_size: int, num_queries: int, hidden_size: int
) -> tuple[int, int]:
    """Numbers of columns of ids and of values."""
    if options is None:
        return 1, 3
    top_k = min(options.top_k, vocab_size)
    hidden = hidden_size if options.hidden_states else 0
    drawn = options.num_sampled_tokens if options.sampled_logprobs else 0
    optional = len(options.temperatures) + options.entropy + num_queries + hidden + drawn
    return 1 + top_k + options.num_sampled_tokens, 3 + top_k + optional


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpacked:
    """Parsed rows of a worker."""

    rows: Distributions
    sampling_logprobs: Float32Array
    missing: bool
    """True if a row was not computed, which invalidates all."""


def unpack(
    ids: Int32Array,
    values: Float32Array,
    halves: npt.NDArray[Any] | None = None,
    *,
    start: int,
    options: DistributionOptions | None,
    vocab_size: int,
    num_queries: int = 0,
    hidden_size: int = 0,
) -> Unpacked:
    """Parses rows from the arrays of `PackedRows`, which may be wider than the request's own columns.

    `start` is the position that the first row predicts. Raises `StillhouseError` (NON_FINITE).
    """
    num_ids, num_values = column_counts(
        options, vocab_size=vocab_size, num_queries=num_queries, hidden_size=hidden_size
    )
    if halves is not None and (halves.ndim < 2 or not halves.shape[1]):
        halves = None
    if halves is not None:
        num_values -= halves.shape[1]
    if ids.shape[1] < num_ids or values.shape[1] < num_values:
        raise RuntimeError(
            f"vLLM's worker returned rows of {ids.shape[1]} ids and {values.shape[1]} values; {num_ids} and "
            f"{num_values} were requested"
        )
    options = options or DistributionOptions(top_k=0)
    top_k = min(options.top_k, vocab_size)
    missing = bool((ids[:, 0] == MISSING).any())
    bad_T = np.isnan(values[:, 0])
    if not missing and bad_T.any():
        raise non_finite(start + int(bad_T.argmax()))
    at = 1

    def next_columns(count: int) -> Any:
        nonlocal at
        at += count
        return np.ascontiguousarray(values[:, at - count : at])

    logprobs = next_columns(top_k) if halves is None else halves.astype(np.float32)
    log_tail, sampling = next_columns(1)[:, 0], next_columns(1)[:, 0]
    rows = Distributions(
        start=start,
        token_ids=np.ascontiguousarray(ids[:, 1 : 1 + top_k]),
        logprobs=logprobs,
        target_logprobs=np.ascontiguousarray(values[:, 0]),
        log_tail=log_tail,
        log_partitions=next_columns(len(options.temperatures)) if options.temperatures else None,
        entropy=next_columns(1)[:, 0] if options.entropy else None,
        query_logprobs=next_columns(num_queries) if num_queries else None,
        hidden_states=next_columns(hidden_size) if options.hidden_states else None,
        sampled_token_ids=np.ascontiguousarray(ids[:, 1 + top_k : num_ids])
        if options.num_sampled_tokens
        else None,
        sampled_logprobs=next_columns(options.num_sampled_tokens)
        if options.num_sampled_tokens and options.sampled_logprobs
        else None,
    )
    return Unpacked(rows=rows, sampling_logprobs=sampling, missing=missing)
