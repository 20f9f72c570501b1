"""Requests with a plan that vLLM's second model runner works on, and what the host knows of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.teacher_service.distributions import draws
from stillhouse.teacher_service.distributions.from_logits import RowSpec
from stillhouse.teacher_service.engine import Int32Array
from stillhouse.teacher_service.engines.vllm.worker.request_plan import (
    PackedRows,
    SamplingPlan,
    ScorePlan,
    read_plan,
)
from stillhouse.teacher_service.engines.vllm.worker.row_buffer import RowBuffer


@dataclass(kw_only=True, slots=True)
class ScoredPrompt:
    """A prompt with a `ScorePlan`."""

    plan: ScorePlan
    sequence: Int32Array
    """The prompt, and the token after it."""
    uniforms: npt.NDArray[np.float64] | None
    """[T, R] of its T rows."""
    parts: list[PackedRows] = field(default_factory=list)
    """Rows computed so far, on the device until the prompt ends."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """A sample with a `SamplingPlan`."""

    plan: SamplingPlan
    params: Any
    """vLLM's `SamplingParams`."""
    num_prompt_tokens: int
    tokens: list[int]
    """Prompt and the generated tokens that the host knows."""
    buffer: RowBuffer = field(default_factory=RowBuffer)
    num_released: int = 0
    """Rows that have left."""

    def resume(self, tokens: list[int]) -> None:
        """Continues after preemption from these tokens; rows of tokens that vLLM dropped are dropped."""
        self.tokens = list(tokens)
        kept = len(tokens) - self.num_prompt_tokens - self.num_released
        del self.buffer.rows[max(0, kept) :]


Planned = ScoredPrompt | Sample


class PlannedRequests:
    """The requests by id, from their first step to their last, preempted ones included."""

    def __init__(self) -> None:
        self._requests: dict[str, Planned] = {}

    def get(self, request_id: str) -> Planned | None:
        """Returns the request; None for one without a plan."""
        return self._requests.get(request_id)

    def update(self, scheduler_output: Any) -> None:
        """Forgets finished requests, and takes up new and resumed ones, from vLLM's `SchedulerOutput`."""
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            if (request := self._taken_up(new)) is not None:
                self._requests[new.req_id] = request

    def _taken_up(self, new: Any) -> Planned | None:
        params = new.sampling_params
        plan = None if params is None else read_plan(params.extra_args)
        if plan is None:
            return None
        if isinstance(plan, ScorePlan):
            sequence = np.array([*new.prompt_token_ids, plan.last], dtype=np.int32)
            spec = RowSpec(start=plan.start, sequence=sequence)
            return ScoredPrompt(plan=plan, sequence=sequence, uniforms=draws.uniforms(spec, plan.options))
        known = self._requests.get(new.req_id)
        if isinstance(known, Sample):
            known.resume(new.prefill_token_ids)
            return known
        return Sample(
            plan=plan,
            params=params,
            num_prompt_tokens=len(new.prompt_token_ids),
            tokens=list(new.prefill_token_ids),
        )
