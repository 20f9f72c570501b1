"""Stillhouse inside vLLM's worker process, for vLLM's first model runner: rows of scored prompts, exact and no more than asked for.

It is loaded as vLLM's `worker_extension_cls` and replaces three methods of the runner of this process, for requests that
carry a plan (`vllm_plan`); all others go to vLLM's own methods. It was read and run against the runner of vLLM 0.32's CPU
build. On GPUs it has not been run.
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

from stillhouse.protos.errors import StillhouseError
from stillhouse.teacher_service.distributions import from_logits
from stillhouse.teacher_service.distributions.from_logits import RowSpec
from stillhouse.teacher_service.engine import Float32Array, Int32Array
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import (
    SHARED_ROWS,
    HelperThreads,
    with_free_cores,
)
from stillhouse.teacher_service.engines.vllm.worker.lm_head import (
    Head,
    SharedHead,
    adapts_head,
    output_layer,
    shared_output_layer,
)
from stillhouse.teacher_service.engines.vllm.worker.malloc_trim import trim_regularly
from stillhouse.teacher_service.engines.vllm.worker.request_plan import (
    MISSING,
    ScorePlan,
    column_counts,
    pack,
    read_plan,
)

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


class WorkerExtension:
    """What vLLM mixes into its worker."""

    def stillhouse_install(self) -> str:
        """Replaces the runner's methods. Returns why it cannot, or nothing."""
        try:
            install(self.model_runner)  # type: ignore[attr-defined]
        except (ImportError, AttributeError, TypeError) as error:
            return str(error) or type(error).__name__
        return ""


def install(runner: Any) -> None:
    """Replaces the methods once. Raises AttributeError or TypeError where the runner is not the one that this was written for."""
    from stillhouse.teacher_service.engines.vllm.worker.sampling import sampler

    if getattr(runner, "stillhouse_installed", False):
        return
    if type(runner).__module__.startswith("vllm.v1.worker.gpu."):
        raise TypeError("vLLM runs its second model runner; VLLM_USE_V2_MODEL_RUNNER=0 takes the first")
    for name, parameters in _METHODS.items():
        found = list(inspect.signature(getattr(runner, name)).parameters)
        if found != parameters:
            raise TypeError(f"{type(runner).__name__}.{name} takes {found}")
    for name in _STATE:
        getattr(runner, name)
    helpers = HelperThreads.from_environment()
    runner._get_prompt_logprobs_dict = _scorer(runner, runner._get_prompt_logprobs_dict, helpers)
    runner._sample = sampler(runner, runner._sample, get_plan, helpers)
    if helpers.count:
        runner.execute_model = with_free_cores(runner, runner.execute_model, helpers.count)
    if runner.device.type == "cpu":
        trim_regularly()
    runner.stillhouse_installed = True


def get_plan(request: Any) -> Any:
    """The plan of a request that the runner knows, read once."""
    try:
        return request.stillhouse_plan
    except AttributeError:
        params = request.sampling_params
        request.stillhouse_plan = None if params is None else read_plan(params.extra_args)
        return request.stillhouse_plan


@dataclass(kw_only=True, slots=True)
class _Scoring:
    """A prompt whose rows are being computed, in as many steps as it takes."""

    plan: ScorePlan
    target: RowSpec
    draws: np.ndarray[Any, np.dtype[np.float64]] | None
    ids: Int32Array
    values: Float32Array


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """Rows of one prompt in this step."""

    scoring: _Scoring
    offset: int
    """Of the hidden state of the first, in the step's batch."""
    begin: int
    """Row of the target."""
    count: int


def _scorer(runner: Any, original: Callable[..., Any], helpers: HelperThreads) -> Callable[..., Any]:
    head, bound = output_layer(runner)
    elements = from_logits.CHUNK_ELEMENTS if runner.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    max_rows = max(1, min(bound or elements, elements // runner.input_batch.vocab_size))
    shared_head = shared_output_layer(runner) if helpers.count else None
    if helpers.count:
        max_rows = min(max_rows, SHARED_ROWS)

    def get_prompt_logprobs_dict(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        ours = {
            name: count for name, count in runner.num_prompt_logprobs.items()
            if isinstance(get_plan(runner.requests[name]), ScorePlan)
        }  # fmt: skip
        if not ours:
            return original(hidden_states, num_scheduled_tokens)
        for name in ours:
            del runner.num_prompt_logprobs[name]
        answers = original(hidden_states, num_scheduled_tokens)
        segments = []
        for name, width in ours.items():
            num_tokens = num_scheduled_tokens.get(name)
            request = runner.requests[name]
            ends = (
                num_tokens is not None
                and request.num_computed_tokens + num_tokens >= request.num_prompt_tokens
            )
            if num_tokens is not None:
                segments.append(_segment(runner, request, name, num_tokens, hidden_states.shape[-1]))
            if ends:
                answers[name] = segments[-1].scoring
            else:
                runner.num_prompt_logprobs[name] = width
        present = [each for each in segments if each.count > 0]
        tensors = {
            name: _tensors(each) if isinstance(each, _Scoring) else each for name, each in answers.items()
        }
        if not present:
            return tensors
        if shared_head is None or any(
            adapts_head(runner, runner.requests[name].lora_request) for name in ours
        ):
            _compute(head, max_rows, hidden_states, present, helpers)
        else:
            _compute_shared(shared_head, hidden_states, present, helpers)
        return tensors

    return get_prompt_logprobs_dict


def _segment(runner: Any, request: Any, name: str, num_tokens: int, hidden_size: int) -> _Segment:
    """The rows whose hidden states this step computed; row t is of the token before position start + t."""
    scoring = _scoring(runner, request, hidden_size)
    first = max(request.num_computed_tokens, scoring.plan.start - 1)
    end = min(request.num_computed_tokens + num_tokens, request.num_prompt_tokens)
    offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
    return _Segment(
        scoring=scoring,
        offset=offset + first - request.num_computed_tokens,
        begin=first - scoring.plan.start + 1,
        count=end - first,
    )


def _scoring(runner: Any, request: Any, hidden_size: int) -> _Scoring:
    """What is known of a prompt: the request keeps it, and it goes with the request."""
    if request.in_progress_prompt_logprobs_cpu is None:
        plan = get_plan(request)
        sequence = np.array([*request.prompt_token_ids, plan.last], dtype=np.int32)
        target = RowSpec(start=plan.start, sequence=sequence, query_token_ids=plan.query_token_ids)
        num_ids, num_values = column_counts(
            plan.options,
            vocab_size=runner.input_batch.vocab_size,
            num_queries=0 if plan.query_token_ids is None else plan.query_token_ids.shape[1],
            hidden_size=hidden_size,
        )
        num_rows = len(sequence) - plan.start
        request.in_progress_prompt_logprobs_cpu = _Scoring(
            plan=plan,
            target=target,
            draws=from_logits.uniforms(target, plan.options),
            ids=np.full((num_rows, num_ids), MISSING, np.int32),
            values=np.zeros((num_rows, num_values), np.float32),
        )
    scoring: _Scoring = request.in_progress_prompt_logprobs_cpu
    return scoring


def _compute_shared(
    head: SharedHead, hidden_states: Tensor, segments: list[_Segment], helpers: HelperThreads
) -> None:
    """Fills in the rows of this step, each chunk from hidden states to rows by one thread."""
    num_rows = sum(each.count for each in segments)
    hidden_TH = _joined(hidden_states, segments)
    size = helpers.chunk_rows(num_rows, head.weight.numel())
    with helpers.sharing() as share:
        for begin in range(0, num_rows, size):
            end = min(begin + size, num_rows)
            places = list(_within(segments, begin, end))
            share(partial(_fill_all, head, hidden_TH[begin:end], places, begin))


def _fill_all(
    head: SharedHead, hidden_TH: Tensor, places: list[tuple[_Segment, int, int, int]], begin: int
) -> None:
    logits_TV = head(hidden_TH)
    for segment, low, high, row in places:
        part = slice(low - begin, high - begin)
        _fill(segment.scoring, row, logits_TV[part], hidden_TH[part])


def _joined(hidden_states: Tensor, segments: list[_Segment]) -> Tensor:
    views = [hidden_states[each.offset : each.offset + each.count] for each in segments]
    return views[0] if len(views) == 1 else torch.cat(views)


def _compute(
    head: Head, max_rows: int, hidden_states: Tensor, segments: list[_Segment], helpers: HelperThreads
) -> None:
    """Fills in the rows of this step, a few rows of logits at a time, whichever prompts they belong to.

    Every rank of a split model calls the head equally often, whatever becomes of a prompt.
    """
    hidden_TH = _joined(hidden_states, segments)
    places_T = torch.cat([torch.arange(each.offset, each.offset + each.count) for each in segments])
    places_T = places_T.to(hidden_TH.device)
    with helpers.sharing() as share:
        for begin in range(0, len(hidden_TH), max_rows):
            rows_TH = hidden_TH[begin : begin + max_rows]
            logits_TV = head(rows_TH, places_T[begin : begin + max_rows])
            if logits_TV is None:
                continue  # another rank has them
            for segment, low, high, row in _within(segments, begin, begin + len(rows_TH)):
                part = slice(low - begin, high - begin)
                share(partial(_fill, segment.scoring, row, logits_TV[part], rows_TH[part]))


def _within(segments: list[_Segment], begin: int, end: int) -> Iterator[tuple[_Segment, int, int, int]]:
    """(segment, low, high, row): what of the joined rows [begin, end) belongs to which segment, from its target's row on."""
    at = 0
    for segment in segments:
        low, high = max(at, begin), min(at + segment.count, end)
        if low < high:
            yield segment, low, high, segment.begin + low - at
        at += segment.count


def _fill(scoring: _Scoring, row: int, logits_TV: Tensor, hidden_TH: Tensor) -> None:
    end = row + len(logits_TV)
    position = scoring.plan.start + row
    try:
        rows = from_logits.rows(
            logits_TV,
            hidden_TH,
            begin=row,
            target=scoring.target,
            options=scoring.plan.options,
            draws_TR=scoring.draws,
        )
        ids, values = pack(rows, scoring.target.sequence[position : position + len(logits_TV)])
        scoring.ids[row:end], scoring.values[row:end] = ids, values
    except StillhouseError as error:
        scoring.ids[row:end, 0] = 0
        scoring.values[int(error.metadata["position"]) - scoring.plan.start] = np.nan


def _tensors(scoring: _Scoring) -> Any:
    from vllm.v1.outputs import LogprobsTensors

    return LogprobsTensors(torch.from_numpy(scoring.ids), torch.from_numpy(scoring.values), torch.empty(0))
