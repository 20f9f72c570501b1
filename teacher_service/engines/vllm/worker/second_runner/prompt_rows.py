"""Rows of scored prompts in vLLM's second model runner, in place of its `PromptLogprobsWorker`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.teacher_service.distributions.row_tensors import RowInputs, row_tensors
from stillhouse.teacher_service.distributions.to_device import to_device
from stillhouse.teacher_service.engine import DistributionOptions
from stillhouse.teacher_service.engines.vllm.worker.lm_head import output_layer
from stillhouse.teacher_service.engines.vllm.worker.request_plan import (
    MISSING,
    PackedRows,
    column_counts,
    pack,
)
from stillhouse.teacher_service.engines.vllm.worker.second_runner.requests import (
    PlannedRequests,
    ScoredPrompt,
)
from stillhouse.teacher_service.engines.vllm.worker.second_runner.step_copy import StepCopy

CHUNK_ELEMENTS = 1 << 26
"""Logits computed at once; 256 MiB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """Rows of one prompt in this step."""

    prompt: ScoredPrompt
    offset: int
    """Index of the first row's hidden state in the step's batch."""
    begin: int
    """Index of the first row in the prompt's rows."""
    count: int

    @property
    def group(self) -> tuple[DistributionOptions, int]:
        """Rows with equal groups have the same columns."""
        queries = self.prompt.plan.query_token_ids
        return replace(self.prompt.plan.options, seed=0), 0 if queries is None else queries.shape[1]

    def places(self) -> Any:
        """Indices of the hidden states."""
        return np.arange(self.offset, self.offset + self.count)

    def targets(self) -> Any:
        """Tokens that follow."""
        first = self.prompt.plan.start + self.begin
        return self.prompt.sequence[first : first + self.count].astype(np.int64)

    def queries(self) -> Any:
        """Queried ids."""
        queries = self.prompt.plan.query_token_ids
        assert queries is not None
        return queries[self.begin : self.begin + self.count].astype(np.int64)

    def uniforms(self) -> Any:
        """Uniforms of the samples."""
        assert self.prompt.uniforms is not None
        return self.prompt.uniforms[self.begin : self.begin + self.count]


class PromptScorer:
    """vLLM's worker for requests without a plan, and the rows of those with a `ScorePlan`."""

    def __init__(self, runner: Any, original: Any, requests: PlannedRequests) -> None:
        self._original = original
        self._requests = requests
        self._head, bound = output_layer(runner)
        self._vocab_size = int(runner.vocab_size)
        self._max_rows = max(1, min(bound or CHUNK_ELEMENTS, CHUNK_ELEMENTS // self._vocab_size))
        self.step = StepCopy()
        """Copy that the rows of this step leave with."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        """Called by the runner; keeps vLLM from computing rows of its own for a request with a plan."""
        if self._requests.get(req_id) is not None:
            sampling_params = copy(sampling_params)
            sampling_params.prompt_logprobs = None
        self._original.add_request(req_id, req_idx, sampling_params)

    def compute_prompt_logprobs(  # noqa: PLR0917 - vLLM's signature
        self,
        logits_fn: Any,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Tensor,
        prompt_lens: Any,
    ) -> dict[str, Any]:
        """Called by the runner after each step: rows of the prompts that end in it, by request."""
        results: dict[str, Any] = self._original.compute_prompt_logprobs(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        groups: dict[Any, list[_Segment]] = {}
        ended: dict[str, ScoredPrompt] = {}
        for at, name in enumerate(input_batch.req_ids):
            prompt = self._requests.get(name)
            if not isinstance(prompt, ScoredPrompt):
                continue
            segment = _segment(prompt, input_batch, at)
            if segment.count > 0:
                groups.setdefault(segment.group, []).append(segment)
            read = input_batch.num_computed_prefill_tokens_np[at] + input_batch.num_scheduled_tokens[at]
            if read >= len(prompt.sequence) - 1:
                ended[name] = prompt
        for segments in groups.values():
            self._compute(hidden_states, segments)
        for name, prompt in ended.items():
            columns = _joined(prompt.parts or [self._missing(prompt, hidden_states)])
            prompt.parts = []
            results[name] = LeavingRows(self.step, self.step.add(columns))
        self.step.join()
        return results

    def _missing(self, prompt: ScoredPrompt, hidden_states: Tensor) -> PackedRows:
        """One row not computed, for a prompt of which the prefix cache had all."""
        queries = prompt.plan.query_token_ids
        num_ids, num_values = column_counts(
            prompt.plan.options,
            vocab_size=self._vocab_size,
            num_queries=0 if queries is None else queries.shape[1],
            hidden_size=hidden_states.shape[-1],
        )
        device = hidden_states.device
        ids = torch.full((1, num_ids), MISSING, dtype=torch.int32, device=device)
        halves = torch.empty((1, 0), dtype=torch.float16, device=device)
        return PackedRows(ids, torch.zeros((1, num_values), device=device), halves)

    def _compute(self, hidden_states: Tensor, segments: list[_Segment]) -> None:
        """Computes rows with the same columns in chunks that span prompts, and gives each prompt its part.

        Every rank of a split model calls the head equally often.
        """
        device, options = hidden_states.device, segments[0].prompt.plan.options

        def joined(of: Any) -> Tensor:
            return to_device(np.concatenate([of(each) for each in segments]), device)

        places_T = joined(_Segment.places)
        has_queries = segments[0].prompt.plan.query_token_ids is not None
        inputs = RowInputs(
            targets=joined(_Segment.targets),
            queries=joined(_Segment.queries) if has_queries else None,
            uniforms=joined(_Segment.uniforms) if options.num_sampled_tokens else None,
        )
        parts = []
        for begin in range(0, len(places_T), self._max_rows):
            chunk_T = places_T[begin : begin + self._max_rows]
            hidden_TH = hidden_states.index_select(0, chunk_T)
            logits_TV = self._head(hidden_TH, chunk_T)
            if logits_TV is None:
                continue  # another rank has them
            chunk = replace(inputs.rows(begin, begin + len(chunk_T)), hidden_states=hidden_TH)
            found = row_tensors(logits_TV, options, chunk)
            parts.append(pack(found, chunk.targets, half=options.half_logprobs))
        if parts:
            columns = _joined(parts)
            for segment, row in _first_rows(segments):
                rows = slice(row, row + segment.count)
                segment.prompt.parts.append(PackedRows(*(column[rows] for column in columns)))


class LeavingRows:
    """Rows of a prompt in place of vLLM's `LogprobsTensors`, until they are on the host."""

    def __init__(self, step: StepCopy, key: int) -> None:
        self._step = step
        self._key = key

    def to_cpu_nonblocking(self) -> Any:
        """Called by vLLM: its `LogprobsTensors`, whose contents follow."""
        from vllm.v1.outputs import LogprobsTensors

        self._step.start()
        return LogprobsTensors(*(torch.from_numpy(each) for each in self._step.arrays(self._key)))


def _segment(prompt: ScoredPrompt, input_batch: Any, at: int) -> _Segment:
    """Rows whose hidden states this step computed; row t follows the token at position start + t - 1."""
    computed = int(input_batch.num_computed_prefill_tokens_np[at])
    end = min(computed + int(input_batch.num_scheduled_tokens[at]), len(prompt.sequence) - 1)
    first = max(computed, prompt.plan.start - 1)
    return _Segment(
        prompt=prompt,
        offset=int(input_batch.query_start_loc_np[at]) + first - computed,
        begin=first - prompt.plan.start + 1,
        count=end - first,
    )


def _joined(parts: Sequence[PackedRows]) -> PackedRows:
    return PackedRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _first_rows(segments: list[_Segment]) -> Iterator[tuple[_Segment, int]]:
    row = 0
    for segment in segments:
        yield segment, row
        row += segment.count
