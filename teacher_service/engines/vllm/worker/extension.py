"""Worker extension of vLLM: computes exact rows of scored prompts inside the worker process, only as requested.

Loaded as vLLM's `worker_extension_cls`, it replaces three methods of the first model runner for requests that carry a plan
(`request_plan`); all others go to vLLM's own methods. `second_runner` does so for the second. Written for and run with the CPU
build of vLLM 0.32; not run on GPUs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.teacher_service.distributions import draws, from_logits
from stillhouse.teacher_service.distributions.from_logits import RowSpec
from stillhouse.teacher_service.distributions.row_tensors import row_tensors
from stillhouse.teacher_service.engine import Float32Array, Int32Array
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import (
    CACHED_WEIGHTS,
    SHARED_ROWS,
    HelperThreads,
    with_free_cores,
)
from stillhouse.teacher_service.engines.vllm.worker.eager_ranks import count_eagerly
from stillhouse.teacher_service.engines.vllm.worker.lm_head import (
    SharedHead,
    adapts_head,
    output_layer,
    shared_output_layer,
)
from stillhouse.teacher_service.engines.vllm.worker.malloc_trim import trim_regularly
from stillhouse.teacher_service.engines.vllm.worker.plugin import encodes_pending_rows
from stillhouse.teacher_service.engines.vllm.worker.request_plan import (
    MISSING,
    ScorePlan,
    column_counts,
    pack,
    read_plan,
)
from stillhouse.teacher_service.engines.vllm.worker.second_runner import install as second_runner

_METHODS = {
    "_get_prompt_logprobs_dict": ["hidden_states", "num_scheduled_tokens"],
    "_sample": ["logits", "spec_decode_metadata"],
    "execute_model": ["scheduler_output", "intermediate_tensors"],
}
_STATE = (
    "requests", "num_prompt_logprobs", "input_batch", "query_start_loc", "discard_request_mask", "model",
    "device", "max_num_reqs", "max_model_len",
)  # fmt: skip
_GPU_CHUNK_ELEMENTS = 1 << 27
_CACHED_LOGITS = 1 << 22
"""Logits of a chunk on a CPU, fewer than elsewhere, where the layer's weights stay in its cache: rows then find them there."""


class WorkerExtension:
    """Mixin of vLLM's worker."""

    def stillhouse_install(self) -> str:
        """Replaces the runner's methods. Returns the obstacle, empty if there is none."""
        try:
            install(self.model_runner)  # type: ignore[attr-defined]
        except (ImportError, AttributeError, TypeError) as error:
            return str(error) or type(error).__name__
        return ""


def install(runner: Any) -> None:
    """Replaces the methods once. Raises AttributeError or TypeError for an unknown runner."""
    from stillhouse.teacher_service.engines.vllm.worker.sampling import sampler

    if getattr(runner, "stillhouse_installed", False):
        return
    if second_runner.is_second_runner(runner):
        second_runner.install(runner)
        runner.stillhouse_installed = True
        return
    for name, parameters in _METHODS.items():
        found = list(inspect.signature(getattr(runner, name)).parameters)
        if found != parameters:
            raise TypeError(f"{type(runner).__name__}.{name} takes {found}")
    for name in _STATE:
        getattr(runner, name)
    helpers = HelperThreads.from_environment()
    runner._get_prompt_logprobs_dict = PromptScorer(runner, runner._get_prompt_logprobs_dict, helpers)
    runner._sample = sampler(
        runner, runner._sample, get_plan, helpers, pending=helpers.count > 0 and encodes_pending_rows()
    )
    if helpers.count:
        runner.execute_model = with_free_cores(runner, runner.execute_model, helpers.count)
    if runner.device.type == "cpu":
        trim_regularly()
        count_eagerly()
    runner.stillhouse_installed = True


def get_plan(request: Any) -> Any:
    """Plan of one of the runner's requests, parsed once."""
    try:
        return request.stillhouse_plan
    except AttributeError:
        params = request.sampling_params
        request.stillhouse_plan = None if params is None else read_plan(params.extra_args)
        return request.stillhouse_plan


@dataclass(kw_only=True, slots=True)
class _PromptRows:
    """Rows of one prompt, filled in over one or more steps."""

    plan: ScorePlan
    spec: RowSpec
    uniforms: np.ndarray[Any, np.dtype[np.float64]] | None
    ids: Int32Array
    values: Float32Array

    def fill(self, row: int, logits_TV: Tensor, hidden_TH: Tensor) -> None:
        """Fills in rows [row, row + T); NaN marks a row with NaN or infinite logits."""
        end = row + len(logits_TV)
        inputs = self.spec.inputs(row, end, hidden_TH=hidden_TH, uniforms_TR=self.uniforms)
        ids, values, _ = pack(row_tensors(logits_TV, self.plan.options, inputs), inputs.targets)
        self.ids[row:end], self.values[row:end] = ids.cpu().numpy(), values.cpu().numpy()

    def tensors(self) -> Any:
        """vLLM's `LogprobsTensors` of the rows."""
        from vllm.v1.outputs import LogprobsTensors

        return LogprobsTensors(torch.from_numpy(self.ids), torch.from_numpy(self.values), torch.empty(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """Rows of one prompt in this step."""

    rows: _PromptRows
    offset: int
    """Index of the first row's hidden state in the step's batch."""
    begin: int
    """Index of the first row in the prompt's rows."""
    count: int


class PromptScorer:
    """Replaces the runner's `_get_prompt_logprobs_dict`: computes prompts with a `ScorePlan`, leaves all others to vLLM."""

    def __init__(self, runner: Any, original: Callable[..., Any], helpers: HelperThreads) -> None:
        self._runner = runner
        self._original = original
        self._helpers = helpers
        self._head, bound = output_layer(runner)
        elements = from_logits.CHUNK_ELEMENTS if runner.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
        max_rows = max(1, min(bound or elements, elements // runner.input_batch.vocab_size))
        self._shared_head = shared_output_layer(runner) if helpers.count else None
        self._max_rows = min(max_rows, SHARED_ROWS) if helpers.count else max_rows
        self._planned: dict[str, None] = {}
        """Requests taken over from the runner's `num_prompt_logprobs`, until their prompt is read."""

    def __call__(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        """Computes the rows of this step; returns vLLM's `LogprobsTensors` of prompts that end in it, by request."""
        requests = self._runner.requests
        self._take_over()
        results: dict[str, Any] = self._original(hidden_states, num_scheduled_tokens)
        finished, segments = [], []
        for name in [each for each in self._planned if each in num_scheduled_tokens]:
            request, num_tokens = requests[name], num_scheduled_tokens[name]
            segments.append(self._segment(request, name, num_tokens, hidden_states.shape[-1]))
            if request.num_computed_tokens + num_tokens >= request.num_prompt_tokens:
                results[name] = segments[-1].rows.tensors()
                finished.append(name)
        plain = self._shared_head is not None and not any(
            adapts_head(self._runner, requests[name].lora_request) for name in self._planned
        )
        for name in finished:
            del self._planned[name]
        if present := [each for each in segments if each.count > 0]:
            self._compute(hidden_states, present, self._shared_head if plain else None)
        return results

    def _take_over(self) -> None:
        """Moves new requests with a plan out of vLLM's list, and forgets aborted ones."""
        listed, requests = self._runner.num_prompt_logprobs, self._runner.requests
        self._planned = {name: None for name in self._planned if name in requests}
        for name in [each for each in listed if isinstance(get_plan(requests[each]), ScorePlan)]:
            del listed[name]
            self._planned[name] = None

    def _segment(self, request: Any, name: str, num_tokens: int, hidden_size: int) -> _Segment:
        """Rows whose hidden states this step computed; row t follows the token at position start + t - 1."""
        rows = self._rows(request, hidden_size)
        first = max(request.num_computed_tokens, rows.plan.start - 1)
        end = min(request.num_computed_tokens + num_tokens, request.num_prompt_tokens)
        offset = int(self._runner.query_start_loc.np[self._runner.input_batch.req_id_to_index[name]])
        return _Segment(
            rows=rows,
            offset=offset + first - request.num_computed_tokens,
            begin=first - rows.plan.start + 1,
            count=end - first,
        )

    def _rows(self, request: Any, hidden_size: int) -> _PromptRows:
        """Rows of a prompt, which live and die with its request."""
        if request.in_progress_prompt_logprobs_cpu is None:
            plan = get_plan(request)
            sequence = np.array([*request.prompt_token_ids, plan.last], dtype=np.int32)
            spec = RowSpec(start=plan.start, sequence=sequence, query_token_ids=plan.query_token_ids)
            num_ids, num_values = column_counts(
                plan.options,
                vocab_size=self._runner.input_batch.vocab_size,
                num_queries=0 if plan.query_token_ids is None else plan.query_token_ids.shape[1],
                hidden_size=hidden_size,
            )
            num_rows = len(sequence) - plan.start
            request.in_progress_prompt_logprobs_cpu = _PromptRows(
                plan=plan,
                spec=spec,
                uniforms=draws.uniforms(spec, plan.options),
                ids=np.full((num_rows, num_ids), MISSING, np.int32),
                values=np.zeros((num_rows, num_values), np.float32),
            )
        rows: _PromptRows = request.in_progress_prompt_logprobs_cpu
        return rows

    def _compute(self, hidden_states: Tensor, segments: list[_Segment], shared: SharedHead | None) -> None:
        """Fills in the rows of this step in chunks that span prompts.

        With a shared head one thread takes a chunk from hidden states to rows. Otherwise this thread alone computes
        logits: every rank of a split model calls the head equally often, whatever becomes of a prompt.
        """
        views = [hidden_states[each.offset : each.offset + each.count] for each in segments]
        hidden_TH = views[0] if len(views) == 1 else torch.cat(views)
        places_T = torch.cat([torch.arange(each.offset, each.offset + each.count) for each in segments])
        places_T = places_T.to(hidden_TH.device)
        size = self._chunk_rows(len(hidden_TH), hidden_TH.shape[1], shared)
        with self._helpers.sharing() as share:
            for begin in range(0, len(hidden_TH), size):
                rows_TH = hidden_TH[begin : begin + size]
                parts = list(_parts(segments, begin, begin + len(rows_TH)))
                if shared is not None:
                    share(partial(_fill_all, shared, rows_TH, parts))
                    continue
                logits_TV = self._head(rows_TH, places_T[begin : begin + size])
                if logits_TV is None:
                    continue  # another rank has them
                for rows, row, part in parts:
                    share(partial(rows.fill, row, logits_TV[part], rows_TH[part]))

    def _chunk_rows(self, num_rows: int, hidden_size: int, shared: SharedHead | None) -> int:
        size: int = self._max_rows
        vocab_size = self._runner.input_batch.vocab_size
        if shared is not None:
            size = self._helpers.chunk_rows(num_rows, shared.weight.numel())
        elif self._runner.device.type == "cpu" and vocab_size * hidden_size <= CACHED_WEIGHTS:
            size = max(1, min(size, _CACHED_LOGITS // vocab_size))
        return size


def _fill_all(head: SharedHead, hidden_TH: Tensor, parts: list[tuple[_PromptRows, int, slice]]) -> None:
    logits_TV = head(hidden_TH)
    for rows, row, part in parts:
        rows.fill(row, logits_TV[part], hidden_TH[part])


def _parts(segments: list[_Segment], begin: int, end: int) -> Iterator[tuple[_PromptRows, int, slice]]:
    """Splits joined rows [begin, end) by prompt: (rows, first row of the prompt, part of the chunk)."""
    at = 0
    for segment in segments:
        low, high = max(at, begin), min(at + segment.count, end)
        if low < high:
            yield segment.rows, segment.begin + low - at, slice(low - begin, high - begin)
        at += segment.count
