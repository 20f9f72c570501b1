"""Three tiers of rows out of vLLM, from its public options to a worker extension: builds requests, reads arrays."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TierName
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    EngineInfo,
    Float32Array,
    GeneratedChunk,
    GenerateInput,
    Int32Array,
    ScoreInput,
)
from stillhouse.teacher_service.engines.vllm import flat_logprobs
from stillhouse.teacher_service.engines.vllm.sampling_params import SamplingParamsBuilder
from stillhouse.teacher_service.engines.vllm.worker.request_plan import SamplingPlan, ScorePlan, unpack

TIERS: Sequence[TierName] = ("worker", "raw", "public")
"""From the best to the one that every vLLM supports."""


class RowsMissingError(Exception):
    """Requested rows came from the prefix cache, which has no logits."""


class PublicTier:
    """Tier on vLLM's public options: top-k, target, and a tail by difference."""

    name: TierName = "public"
    capabilities: frozenset[int] = frozenset()
    max_query_tokens = 0
    reuse = False
    """True if scored prompts may start from the prefix cache."""

    def __init__(self, info: EngineInfo) -> None:
        """`info` describes the loaded model."""
        self._info = info
        self._params = SamplingParamsBuilder(info)

    def score_params(self, item: ScoreInput, *, reuse: bool) -> tuple[list[int], Any]:  # noqa: ARG002
        """Builds (prompt, `SamplingParams`) of a sequence. `reuse` allows the prefix cache, which vLLM's own rows do
        not support: this tier and the next compute the complete prompt.

        Raises `StillhouseError` (CAPABILITY).
        """
        self._require(item.options, queries=item.query_token_ids is not None)
        ids, forced = self._prompt(item)
        return ids, self._params.prompt_params(self._params.columns(item.options), forced)

    def read_scores(self, item: ScoreInput, output: Any) -> Distributions:
        """Reads the distributions from vLLM's output. Raises `StillhouseError` (NON_FINITE) and RowsMissingError."""
        ids, forced = self._prompt(item)
        parts = []
        if item.start < len(ids):
            num_rows = len(ids) - item.start
            parts.append(self._rows(output.prompt_logprobs, item.start, num_rows, item.options, prompt=True))
        if forced is not None:
            parts.append(self._rows(output.outputs[0].logprobs, len(ids), 1, item.options))
        return Distributions.concat(parts)

    def generate_params(self, item: GenerateInput) -> Any:
        """Builds the `SamplingParams` of a sample. Raises `StillhouseError` (CAPABILITY, INVALID_REQUEST)."""
        if item.options is not None:
            self._require(item.options, queries=False)
        return self._params.sample_params(item)

    def read_chunk(self, item: GenerateInput, completion: Any, position: int) -> GeneratedChunk:
        """Reads the next chunk of a sample, whose first token is at `position`.

        Raises `StillhouseError` (NON_FINITE, TOKEN_OUT_OF_RANGE).
        """
        token_ids = np.asarray(completion.token_ids, dtype=np.int32)
        sampling, rows = self._read_sampled(item, completion, position, token_ids)
        return GeneratedChunk(
            token_ids=token_ids,
            sampling_logprobs=sampling,
            distributions=None if item.options is None else rows,
            finish=completion.finish_reason or "",
        )

    def _read_sampled(
        self, item: GenerateInput, completion: Any, position: int, token_ids: Int32Array
    ) -> tuple[Float32Array, Distributions | None]:
        self._params.require_known(token_ids)
        num_tokens, rows = len(token_ids), None
        if num_tokens:
            options = item.options or DistributionOptions(top_k=0)
            rows = self._rows(completion.logprobs, position, num_tokens, options)
        return self._params.sampling_logprobs(item, num_tokens, rows), rows

    def _prompt(self, item: ScoreInput) -> tuple[list[int], int | None]:
        """Splits a sequence into (prompt, forced token).

        vLLM must have room to generate a token, so the last token of a sequence of full length is forced.
        """
        ids = item.token_ids.tolist()
        forced = ids.pop() if len(ids) == self._info.max_sequence_tokens else None
        return ids, forced

    def _rows(
        self, rows: Any, start: int, num_rows: int, options: DistributionOptions, *, prompt: bool = False
    ) -> Distributions:
        """Converts rows of a prompt, from the one that predicts `start` on, or of generated tokens."""
        return flat_logprobs.to_distributions(
            rows,
            # vLLM's first entry of a prompt is of the first token, which nothing predicts.
            first_row=start if prompt else 0,
            num_rows=num_rows,
            top_k=self._params.columns(options),
            start=start,
            vocab_size=self._info.vocab_size,
        )

    def _require(self, options: DistributionOptions, *, queries: bool) -> None:
        more = (
            options.temperatures,
            options.num_sampled_tokens,
            options.entropy,
            options.hidden_states,
            queries,
        )
        if any(more):
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The vllm engine at tier {self.name} reports top-k, target and tail. Log-partitions, queries, samples, "
                "entropy and hidden states come from its tier worker, and from a teacher started with --engine hf.",
            )


class RawTier(PublicTier):
    """Public requests whose rows stay arrays in vLLM's front end.

    vLLM's second model runner, the default on GPUs, reports queried ids natively; compared with the tier worker once, by hand,
    in Triton's interpreter.
    """

    name: TierName = "raw"

    def __init__(self, info: EngineInfo, *, max_native_queries: int = 0) -> None:
        """`max_native_queries` is vLLM's own limit of queried ids per position; 0 where it has none."""
        super().__init__(info)
        self.max_query_tokens = max_native_queries
        if max_native_queries:
            self.capabilities = frozenset({teacher_pb2.CAPABILITY_QUERY_LOGPROBS})

    def score_params(self, item: ScoreInput, *, reuse: bool) -> tuple[list[int], Any]:
        """Marks the public tier's request for the front end, and adds queries where vLLM takes them.

        Raises `StillhouseError` (CAPABILITY, and SEQUENCE_TOO_LONG for queries after the longest prompt).
        """
        query = item.query_token_ids if self.max_query_tokens else None
        ids, params = super().score_params(
            item if query is None else replace(item, query_token_ids=None), reuse=reuse
        )
        if query is not None:
            if len(ids) < len(item.token_ids):
                raise StillhouseError(
                    Reason.SEQUENCE_TOO_LONG,
                    f"The sequence has {len(item.token_ids)} tokens; with query_token_ids this teacher takes "
                    f"{len(ids)}. Shorten it, or leave the queries out.",
                )
            params.prompt_logprob_token_ids = query
            params.prompt_logprob_start = item.start - 1
        return ids, self._params.keep_arrays(params)

    def read_scores(self, item: ScoreInput, output: Any) -> Distributions:
        """Adds vLLM's native query logprobs to the public tier's distributions."""
        scores = super().read_scores(item, output)
        if item.query_token_ids is None:
            return scores
        query = np.asarray(output.prompt_token_id_logprobs, dtype=np.float32)
        if query.shape != item.query_token_ids.shape:
            raise RuntimeError(f"vLLM returned {query.shape} for queries of {item.query_token_ids.shape}")
        return replace(scores, query_logprobs=query)

    def generate_params(self, item: GenerateInput) -> Any:
        """Marks the public tier's request for the front end."""
        return self._params.keep_arrays(super().generate_params(item))

    def _rows(
        self, rows: Any, start: int, num_rows: int, options: DistributionOptions, *, prompt: bool = False
    ) -> Distributions:
        ids, values = rows[:2] if prompt else rows.joined()
        first_row, top_k = start - 1 if prompt else 0, self._params.columns(options)
        return flat_logprobs.from_arrays(
            ids[first_row:, : top_k + 1],
            values[first_row:, : top_k + 1],
            num_rows=num_rows,
            top_k=top_k,
            start=start,
            vocab_size=self._info.vocab_size,
        )


class WorkerTier(PublicTier):
    """Tier on the worker extension: exact rows with all capabilities of the hf engine, computed only as requested."""

    name: TierName = "worker"
    capabilities = frozenset(
        {
            teacher_pb2.CAPABILITY_LOG_PARTITIONS,
            teacher_pb2.CAPABILITY_QUERY_LOGPROBS,
            teacher_pb2.CAPABILITY_SAMPLED_TOKENS,
            teacher_pb2.CAPABILITY_TAIL_SAMPLES,
            teacher_pb2.CAPABILITY_STRATIFIED_SAMPLES,
            teacher_pb2.CAPABILITY_ENTROPY,
            teacher_pb2.CAPABILITY_HIDDEN_STATES,
        }
    )

    def __init__(self, info: EngineInfo, *, hidden_size: int, max_query_tokens: int, reuse: bool) -> None:
        """With `reuse`, prompts may start from the prefix cache."""
        super().__init__(info)
        self._hidden_size = hidden_size
        self.max_query_tokens = max_query_tokens
        self.reuse = reuse

    def score_params(self, item: ScoreInput, *, reuse: bool) -> tuple[list[int], Any]:
        """Drops the last token from the prompt; its row comes from the token before it."""
        argument = ScorePlan.from_input(item).to_extra_args()
        return item.token_ids[:-1].tolist(), self._params.planned_prompt_params(
            argument, reuse=reuse and self.reuse
        )

    def read_scores(self, item: ScoreInput, output: Any) -> Distributions:
        """Reads the worker's rows. Raises RowsMissingError where some were not computed."""
        ids, values, halves = output.prompt_logprobs
        num_queries = 0 if item.query_token_ids is None else item.query_token_ids.shape[1]
        unpacked = unpack(
            ids,
            values,
            halves,
            start=item.start,
            options=item.options,
            vocab_size=self._info.vocab_size,
            num_queries=num_queries,
            hidden_size=self._hidden_size,
        )
        if unpacked.missing or len(ids) != len(item.token_ids) - item.start:
            raise RowsMissingError(f"{len(ids)} rows of {len(item.token_ids) - item.start}, or empty ones")
        return unpacked.rows

    def generate_params(self, item: GenerateInput) -> Any:
        """Builds a request whose tokens the extension samples."""
        seed = secrets.randbits(64) if item.seed is None else item.seed & (2**64 - 1)
        plan = SamplingPlan.from_input(item, seed=seed, num_valid=self._info.tokenizer_size)
        return self._params.planned_sample_params(item, plan.to_extra_args())

    def _read_sampled(
        self, item: GenerateInput, completion: Any, position: int, token_ids: Int32Array
    ) -> tuple[Float32Array, Distributions | None]:
        if not len(token_ids):
            return np.zeros(0, np.float32), None
        unpacked = unpack(
            *completion.logprobs.joined(),
            start=position,
            options=item.options,
            vocab_size=self._info.vocab_size,
            hidden_size=self._hidden_size,
        )
        sampling = unpacked.sampling_logprobs
        if len(sampling) != len(token_ids):
            raise RuntimeError(f"vLLM gave {len(token_ids)} tokens with {len(sampling)} rows")
        return sampling, unpacked.rows
