"""What a request asks of vLLM's worker beyond vLLM's own options, and the two arrays in which the answer travels.

Used by both ends, which are different processes of one start: a format of no version.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.distributions.from_logits import non_finite
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    Float32Array,
    GenerateInput,
    Int32Array,
    ScoreInput,
)

KEY = "stillhouse"
"""Name in `SamplingParams.extra_args`; a request without it is vLLM's own business."""
KEEP_ARRAYS: dict[str, Any] = {KEY: {}}
"""`extra_args` of a request whose rows shall stay arrays in the front end, and no more."""
HELPER_THREADS_VARIABLE = "STILLHOUSE_VLLM_HELPERS"
"""Variable that tells the worker's process how many threads beside its own select rows (cpu_threads.py)."""
STREAM_INTERVAL_TOKENS = 16
"""Tokens of a sample that come as one chunk, but for its first and its last."""
MISSING = -1
"""First id of a row that was not computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePlan:
    """Rows of a prompt, which is the sequence without its last token."""

    start: int
    """Position that the first row predicts."""
    last: int
    """The token after the prompt, which the last row predicts."""
    options: DistributionOptions
    query_token_ids: Int32Array | None = None

    @classmethod
    def from_input(cls, item: ScoreInput) -> ScorePlan:
        """The plan for one sequence."""
        return cls(
            start=item.start,
            last=int(item.token_ids[-1]),
            options=item.options,
            query_token_ids=item.query_token_ids,
        )

    def to_extra_args(self) -> dict[str, Any]:
        """`SamplingParams.extra_args`: plain values, since they go through two serialisers."""
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
    """How the tokens of one sample are drawn, and what is reported of each."""

    temperature: float
    top_p: float
    top_k: int
    """0 is all."""
    seed: int
    """With the number of tokens written it fixes the next draw."""
    num_valid: int
    """Ids from here on pad the output layer and are never drawn."""
    options: DistributionOptions | None

    @classmethod
    def from_input(cls, item: GenerateInput, *, seed: int, num_valid: int) -> SamplingPlan:
        """The plan for one sample; `seed` in [0, 2^64)."""
        return cls(
            temperature=item.temperature,
            top_p=item.top_p,
            top_k=item.top_k if item.top_k < num_valid else 0,
            seed=seed,
            num_valid=num_valid,
            options=item.options,
        )

    def to_extra_args(self) -> dict[str, Any]:
        """`SamplingParams.extra_args`."""
        draw = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed", "num_valid")}
        return {KEY: {"draw": draw, "options": None if self.options is None else _plain(self.options)}}


def read_plan(extra_args: dict[str, Any] | None) -> ScorePlan | SamplingPlan | None:
    """The plan of a request, None where it has none."""
    argument = (extra_args or {}).get(KEY) or {}
    options = argument.get("options")
    options = (
        None
        if options is None
        else DistributionOptions(**{**options, "temperatures": tuple(options["temperatures"])})
    )
    if "draw" in argument:
        return SamplingPlan(**argument["draw"], options=options)
    if "score" not in argument:
        return None
    query = argument["query"]
    ids = None if query is None else np.frombuffer(query["ids"], "<i4").reshape(-1, query["width"])
    assert options is not None
    return ScorePlan(**argument["score"], options=options, query_token_ids=ids)


def score_start(extra_args: dict[str, Any] | None) -> int | None:
    """First position that a request scores, None where it scores nothing: read often, so read alone."""
    score = ((extra_args or {}).get(KEY) or {}).get("score")
    return None if score is None else int(score["start"])


def _plain(options: DistributionOptions) -> dict[str, Any]:
    return {**asdict(options), "temperatures": list(options.temperatures)}


def pack(rows: Distributions, targets: Int32Array) -> tuple[Int32Array, Float32Array]:
    """(ids [T, 1 + K + R], values [T, 3 + K + ...]) of rows of a prompt.

    Ids: the token itself, the likeliest, the draws. Values: the token's logprob (NaN where the logits are no numbers),
    those of the likeliest, tail, sampling logprob, and as far as they are there partitions, entropy, queries, hidden.
    The first 1 + K columns are those of vLLM's own rows.
    """
    ids = [targets[:, None], rows.token_ids, rows.sampled_token_ids]
    values = [
        rows.target_logprobs[:, None],
        rows.logprobs,
        rows.log_tail[:, None],
        np.zeros((rows.num_rows, 1), np.float32),
        rows.log_partitions,
        None if rows.entropy is None else rows.entropy[:, None],
        rows.query_logprobs,
        rows.hidden_states,
    ]
    return _joined(ids, np.int32), _joined(values, np.float32)


def column_counts(
    options: DistributionOptions | None, *, vocab_size: int, num_queries: int, hidden_size: int
) -> tuple[int, int]:
    """Columns of ids and of values."""
    if options is None:
        return 1, 3
    top_k = min(options.top_k, vocab_size)
    hidden = hidden_size if options.hidden_states else 0
    optional = len(options.temperatures) + options.entropy + num_queries + hidden
    return 1 + top_k + options.num_sampled_tokens, 3 + top_k + optional


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpacked:
    """What a worker's rows hold."""

    rows: Distributions
    sampling_logprobs: Float32Array
    missing: bool
    """Whether a row was not computed, so that none of them counts."""


def unpack(
    ids: Int32Array,
    values: Float32Array,
    *,
    start: int,
    options: DistributionOptions | None,
    vocab_size: int,
    num_queries: int = 0,
    hidden_size: int = 0,
) -> Unpacked:
    """The rows of these arrays, which may be wider than the request's own columns.

    `start` is the position that the first row predicts. Raises `StillhouseError` (NON_FINITE).
    """
    num_ids, num_values = column_counts(
        options, vocab_size=vocab_size, num_queries=num_queries, hidden_size=hidden_size
    )
    if ids.shape[1] < num_ids or values.shape[1] < num_values:
        raise RuntimeError(
            f"vLLM's worker returned rows of {ids.shape[1]} ids and {values.shape[1]} values; {num_ids} and "
            f"{num_values} were asked for"
        )
    options = options or DistributionOptions(top_k=0)
    top_k = min(options.top_k, vocab_size)
    missing = bool((ids[:, 0] == MISSING).any())
    bad_T = np.isnan(values[:, 0])
    if not missing and bad_T.any():
        raise non_finite(start + int(bad_T.argmax()))
    at = 1

    def take(count: int) -> Any:
        nonlocal at
        at += count
        return np.ascontiguousarray(values[:, at - count : at])

    logprobs, log_tail, sampling = take(top_k), take(1)[:, 0], take(1)[:, 0]
    rows = Distributions(
        start=start,
        token_ids=np.ascontiguousarray(ids[:, 1 : 1 + top_k]),
        logprobs=logprobs,
        target_logprobs=np.ascontiguousarray(values[:, 0]),
        log_tail=log_tail,
        log_partitions=take(len(options.temperatures)) if options.temperatures else None,
        entropy=take(1)[:, 0] if options.entropy else None,
        query_logprobs=take(num_queries) if num_queries else None,
        hidden_states=take(hidden_size) if options.hidden_states else None,
        sampled_token_ids=np.ascontiguousarray(ids[:, 1 + top_k : num_ids])
        if options.num_sampled_tokens
        else None,
    )
    return Unpacked(rows=rows, sampling_logprobs=sampling, missing=missing)


def _joined(parts: list[Any], dtype: npt.DTypeLike) -> Any:
    return np.concatenate([part for part in parts if part is not None], axis=1, dtype=dtype)
