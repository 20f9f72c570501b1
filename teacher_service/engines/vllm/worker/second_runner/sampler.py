"""Tokens of samples with a plan in vLLM's second model runner, in place of its `Sampler`, with the rows that they came from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.teacher_service.distributions import normalisation
from stillhouse.teacher_service.distributions.to_device import to_device
from stillhouse.teacher_service.engines.vllm.worker.row_buffer import OutgoingRows, is_due, known
from stillhouse.teacher_service.engines.vllm.worker.sampled_rows import prefix_uniforms, sampled_columns
from stillhouse.teacher_service.engines.vllm.worker.second_runner.requests import PlannedRequests, Sample
from stillhouse.teacher_service.engines.vllm.worker.second_runner.step_copy import StepCopy


class PlannedSampler:
    """vLLM's sampler for requests without a plan, and tokens by plan for the others.

    The token that ends a scored prompt is ignored, and not sampled.
    """

    def __init__(
        self, runner: Any, original: Any, requests: PlannedRequests, begin: Callable[[StepCopy], None]
    ) -> None:
        """`begin` tells the prompts' rows which copy to leave with."""
        self._original = original
        self._requests = requests
        self._begin = begin
        self._max_model_len = int(runner.max_model_len)
        self._last: SampledStep | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        """Called by the runner in each step: vLLM's `SamplerOutput`."""
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        copy = StepCopy()
        self._begin(copy)
        requests = [self._requests.get(name) for name in input_batch.req_ids]
        if not any(requests) or len(logits) != len(requests):
            return self._original(logits, input_batch)
        device, num_rows = logits.device, len(requests)
        ends = input_batch.seq_lens_cpu_upper_bound.numpy()[:num_rows]
        is_read = ends >= input_batch.prefill_len_np  # a partially read prompt has an unused row, too
        step = SampledStep(copy, self._max_model_len)
        tokens_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        if foreign := [row for row, request in enumerate(requests) if request is None]:
            # vLLM's sampler may overwrite its input.
            output = self._original(logits.clone(), input_batch)
            foreign_B = to_device(np.array(foreign), device)
            tokens_B.index_copy_(
                0, foreign_B, output.sampled_token_ids[:, 0].index_select(0, foreign_B).long()
            )
            step.add_foreign(foreign, foreign_B, output.logprobs_tensors)
        for rows, samples in self._groups(requests, is_read):
            rows_B = to_device(np.array(rows), device)
            some_BV = logits if len(rows) == num_rows else logits.index_select(0, rows_B)
            plans = [each.plan for each in samples]
            positions = [
                int(ends[row]) - each.num_prompt_tokens for row, each in zip(rows, samples, strict=True)
            ]
            uniforms = None
            if plans[0].options is not None and plans[0].options.num_sampled_tokens:
                self._learn_tokens()
                uniforms = prefix_uniforms([each.tokens for each in samples], plans[0].options)
            ids, values = sampled_columns(normalisation.as_float32(some_BV), plans, positions, uniforms)
            tokens_B.index_copy_(0, rows_B, ids[:, 0].long())
            step.add(rows, samples, positions, ids, values)
        self._last = step
        return SamplerOutput(
            sampled_token_ids=tokens_B.unsqueeze(-1),
            logprobs_tensors=step,
            num_nans=None,
            num_sampled=to_device(is_read.astype(np.int32), device),
            num_rejected=torch.zeros(num_rows, dtype=torch.int32, device=device),
        )

    def _learn_tokens(self) -> None:
        """Waits for the tokens of the step before, whose copy was launched before this step's forward pass."""
        if self._last is not None:
            self._last.settle()

    @staticmethod
    def _groups(requests: list[Any], is_read: Any) -> list[tuple[list[int], list[Sample]]]:
        """Groups rows to sample by equal options."""
        groups: dict[Any, list[int]] = {}
        for row, request in enumerate(requests):
            if isinstance(request, Sample) and is_read[row]:
                groups.setdefault((request.plan.options, request.plan.num_valid), []).append(row)
        return [(rows, [requests[row] for row in rows]) for rows in groups.values()]


class SampledStep:
    """Rows of one step in place of vLLM's `LogprobsTensors`."""

    def __init__(self, copy: StepCopy, max_model_len: int) -> None:
        self._copy = copy
        self._max_model_len = max_model_len
        self._groups: list[tuple[list[int], list[Sample], list[int], int]] = []
        self._foreign: tuple[list[int], int] | None = None
        self._is_settled = False
        self._lock = threading.Lock()

    def add(
        self, rows: list[int], samples: list[Sample], positions: list[int], ids: Tensor, values: Tensor
    ) -> None:
        """Adds rows of samples, each after as many generated tokens as its position says."""
        self._groups.append((rows, samples, positions, self._copy.add((ids, values))))

    def add_foreign(self, rows: list[int], rows_B: Tensor, tensors: Any) -> None:
        """Adds vLLM's own rows, if it computed any."""
        if tensors is not None:
            parts = tensors.logprob_token_ids, tensors.logprobs, tensors.selected_token_ranks
            ids, values, ranks = (each.index_select(0, rows_B) for each in parts)
            self._foreign = rows, self._copy.add((ids.int(), values.float(), ranks.int()))

    def to_cpu_nonblocking(self) -> SampledStep:
        """Called by vLLM on its copy stream."""
        self._copy.start()
        return self

    def settle(self) -> None:
        """Waits for the copy, and tells each sample its token and row, once."""
        with self._lock:  # vLLM may read outputs in a thread of its own
            if self._is_settled:
                return
            self._is_settled = True
            self._copy.wait()
            for _, samples, positions, key in self._groups:
                ids, values = self._copy.arrays(key)
                columns = known(ids, values)
                for at, (sample, position) in enumerate(zip(samples, positions, strict=True)):
                    del sample.tokens[sample.num_prompt_tokens + position :]
                    sample.tokens.append(int(ids[at, 0]))
                    sample.buffer.rows.append((columns, at))

    def tolists(self) -> OutgoingRows:
        """Called by vLLM once the step has ended: rows released with it, with the buffered rows of their samples."""
        self.settle()
        blocks = {}
        if self._foreign is not None:
            rows, key = self._foreign
            ids, values, ranks = self._copy.arrays(key)
            blocks = {
                row: (ids[at : at + 1], values[at : at + 1], ranks[at : at + 1])
                for at, row in enumerate(rows)
            }
        for rows, samples, positions, key in self._groups:
            ids, _ = self._copy.arrays(key)
            for at, (row, sample, position) in enumerate(zip(rows, samples, positions, strict=True)):
                room = self._max_model_len - sample.num_prompt_tokens
                if is_due(sample.params, int(ids[at, 0]), written=position, room=room):
                    blocks[row] = sample.buffer.drain(position + 1 - sample.num_released)
                    sample.num_released = position + 1
        return OutgoingRows(blocks)
