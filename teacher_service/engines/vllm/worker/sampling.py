"""Samples tokens inside vLLM's worker, and reports their distributions, from the logits of one decode pass.

Replaces `_sample` of vLLM's first model runner for requests with a plan; run on the CPU build only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.teacher_service.distributions import normalisation, row_tensors
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import HelperThreads
from stillhouse.teacher_service.engines.vllm.worker.request_plan import SamplingPlan
from stillhouse.teacher_service.engines.vllm.worker.row_buffer import OutgoingRows, RowBuffer, is_due
from stillhouse.teacher_service.engines.vllm.worker.sampled_rows import prefix_uniforms, sampled_columns

_SHARED_ELEMENTS = 1 << 16
"""Smallest number of logits worth sharing with another thread."""


def sampler(
    runner: Any, original: Callable[..., Any], get_plan: Callable[[Any], Any], helpers: HelperThreads
) -> Callable[..., Any]:
    """Builds the replacement of `runner._sample`. The mandatory token after a scored prompt is ignored, and not sampled."""
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    on_cpu, longest = runner.device.type == "cpu", runner.max_model_len

    def sample(logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        requests = [runner.requests[name] for name in runner.input_batch.req_ids]
        plans = [get_plan(request) for request in requests]
        if logits is None or spec_decode_metadata is not None or not any(plans):
            return original(logits, spec_decode_metadata)
        step = _Step(tokens=torch.zeros((len(plans), 1), dtype=torch.int32, device=logits.device))
        if foreign := [row for row, plan in enumerate(plans) if plan is None]:
            # vLLM's sampler overwrites its input.
            step.copy(foreign, original(logits.clone(), spec_decode_metadata))
        unfinished = runner.discard_request_mask.np
        with helpers.sharing() as share:
            for rows in _row_groups(plans, unfinished, logits, helpers.count + 1):
                chosen = [plans[row] for row in rows], [requests[row] for row in rows]
                share(partial(_sample_into, step, rows, *chosen, logits))
        released = _released_rows(step, requests, longest) if on_cpu else step.tensors(LogprobsTensors)
        return SamplerOutput(sampled_token_ids=step.tokens, logprobs_tensors=released)

    return sample


def _released_rows(step: _Step, requests: list[Any], longest: int) -> OutgoingRows:
    """Rows released with this step, with the buffered rows of their samples; vLLM's own are released at once."""
    tokens, blocks = step.tokens[:, 0].tolist(), {}
    for rows, *tensors in step.parts:
        ids, values = (each.numpy() for each in tensors)
        for at, row in enumerate(rows):
            request = requests[row]
            if request.stillhouse_plan is None:
                assert step.ranks is not None
                blocks[row] = ids[at : at + 1], values[at : at + 1], step.ranks[row : row + 1].numpy()
                continue
            buffer = request.stillhouse_row_buffer = (
                getattr(request, "stillhouse_row_buffer", None) or RowBuffer()
            )
            buffer.rows.append((ids, values, at))
            written, prompt = len(request.output_token_ids), request.num_prompt_tokens
            if is_due(request.sampling_params, tokens[row], written=written, room=longest - prompt):
                blocks[row] = buffer.drain()
    return OutgoingRows(blocks)


@dataclass(kw_only=True, slots=True)
class _Step:
    """Results of one decode pass: a token for each row of the batch, and columns of rows that report any."""

    tokens: Tensor
    parts: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list)
    ranks: Tensor | None = None

    def add(self, rows: list[int], ids: Tensor, values: Tensor) -> None:
        self.tokens[rows, 0] = ids[:, 0].int()
        self.parts.append((rows, ids, values))

    def copy(self, rows: list[int], output: Any) -> None:
        """Copies the results of vLLM's sampler for these rows."""
        self.tokens[rows] = output.sampled_token_ids[rows].to(self.tokens.dtype)
        if (theirs := output.logprobs_tensors) is not None:
            self.parts.append((rows, theirs.logprob_token_ids[rows], theirs.logprobs[rows]))
            self.ranks = theirs.selected_token_ranks

    def tensors(self, kind: Callable[..., Any]) -> Any:
        """Joins all columns into vLLM's `LogprobsTensors`, as wide as the widest."""
        num_rows, device = len(self.tokens), self.tokens.device
        if len(self.parts) == 1 and len(self.parts[0][0]) == num_rows:
            _, ids, values = self.parts[0]
        else:
            columns = [(ids, values) for _, ids, values in self.parts]
            num_ids, num_values = (max((part[at].shape[1] for part in columns), default=1) for at in (0, 1))
            ids = torch.zeros((num_rows, num_ids), dtype=torch.int32, device=device)
            values = torch.zeros((num_rows, num_values), dtype=torch.float32, device=device)
            for rows, some_ids, some_values in self.parts:
                ids[rows, : some_ids.shape[1]] = some_ids.int()
                values[rows, : some_values.shape[1]] = some_values
        ranks = torch.zeros(num_rows, dtype=torch.int32, device=device) if self.ranks is None else self.ranks
        return kind(ids, values, ranks)


def _sample_into(
    step: _Step, rows: list[int], plans: list[SamplingPlan], requests: list[Any], logits: Tensor
) -> None:
    prefixes = [[*request.prompt_token_ids, *request.output_token_ids] for request in requests]
    positions = [len(request.output_token_ids) for request in requests]
    uniforms = prefix_uniforms(prefixes, plans[0].options)
    step.add(rows, *sampled_columns(_select_rows(logits, rows), plans, positions, uniforms))


def _row_groups(plans: list[Any], unfinished: Any, logits: Tensor, num_threads: int) -> Iterator[list[int]]:
    """Groups rows to sample by equal options, in sizes that fit a CPU's cache and occupy its threads."""
    groups: dict[Any, list[int]] = {}
    for row, plan in enumerate(plans):
        # Partially read prompts have an unused row here, too.
        if isinstance(plan, SamplingPlan) and not unfinished[row]:
            groups.setdefault((plan.options, plan.num_valid), []).append(row)
    whole = (
        max(1, row_tensors.GROUP_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(plans)
    )
    for rows in groups.values():
        least = max(1, _SHARED_ELEMENTS // logits.shape[1])
        size = whole if num_threads == 1 else min(whole, max(least, -(-len(rows) // num_threads)))
        for begin in range(0, len(rows), size):
            yield rows[begin : begin + size]


def _select_rows(logits: Tensor, rows: list[int]) -> Tensor:
    adjacent = rows[-1] - rows[0] + 1 == len(rows)
    return normalisation.as_float32(logits[rows[0] : rows[-1] + 1] if adjacent else logits[rows])
