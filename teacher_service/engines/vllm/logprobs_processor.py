"""Keeps rows as arrays in vLLM's front end, which otherwise makes a Python object of every number.

Replaces `LogprobsProcessor` in `vllm.v1.engine.output_processor` for requests with Stillhouse's argument; all others get
vLLM's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from stillhouse.teacher_service.engines.vllm.worker.request_plan import KEY

Block = tuple[Any, Any]
_PARTS = ("logprobs", "prompt_logprobs", "cumulative_logprob", "num_logprobs", "num_prompt_logprobs")


class RawRows:
    """Rows of generated tokens, in the blocks that they came in."""

    def __init__(self, blocks: list[Block] | None = None) -> None:
        self.blocks = blocks or []
        """(ids, values), one row per token; widths may differ."""

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self.blocks)

    def __getitem__(self, index: slice) -> RawRows:
        begin, end, _ = index.indices(len(self))
        blocks: list[Block] = []
        for ids, values in self.blocks:
            rows = slice(max(begin, 0), max(end, 0))
            if len(ids[rows]):
                blocks.append((ids[rows], values[rows]))
            begin, end = begin - len(ids), end - len(ids)
        return RawRows(blocks)

    def extend(self, other: RawRows) -> None:
        """Called by vLLM to join outputs that wait for a slow reader."""
        self.blocks += other.blocks

    def joined(self) -> Block:
        """Joins all rows into one block of their common columns."""
        if len(self.blocks) == 1:
            return self.blocks[0]
        return _joined([ids for ids, _ in self.blocks]), _joined([values for _, values in self.blocks])


def _joined(parts: list[Any]) -> Any:
    width = min(part.shape[1] for part in parts)
    return np.concatenate([part[:, :width] for part in parts])


def install() -> str:
    """Replaces the class, once. Returns the obstacle, empty if there is none."""
    try:
        from vllm.v1.engine import output_processor
        from vllm.v1.engine.logprobs import LogprobsProcessor
    except ImportError as error:
        return str(error)
    if getattr(output_processor.LogprobsProcessor, "stillhouse", False):
        return ""
    if output_processor.LogprobsProcessor is not LogprobsProcessor:
        return "vllm.v1.engine.output_processor.LogprobsProcessor is another class"
    missing = set(_PARTS) - set(LogprobsProcessor.__dataclass_fields__)
    takes = list(inspect.signature(LogprobsProcessor.from_new_request).parameters)
    if missing or takes != ["tokenizer", "request"]:
        return f"LogprobsProcessor lacks {sorted(missing)} or from_new_request takes {takes}"
    output_processor.LogprobsProcessor = _processor(LogprobsProcessor)
    return ""


def _processor(base: Any) -> Any:
    class RawLogprobsProcessor(base):  # type: ignore[misc]
        """Processor for `RequestState` that keeps arrays."""

        stillhouse = True
        logprobs: Any

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            if KEY not in (request.sampling_params.extra_args or {}):
                return base.from_new_request(tokenizer=tokenizer, request=request)
            params = request.sampling_params
            return cls(
                tokenizer=None,
                logprobs=None if params.num_logprobs is None else RawRows(),
                prompt_logprobs=None,
                cumulative_logprob=None,
                num_logprobs=params.num_logprobs,
                num_prompt_logprobs=params.prompt_logprobs,
            )

        def update_from_output(self, output: Any) -> None:
            """Appends the arrays of one step."""
            if output.new_prompt_logprobs_tensors is not None:
                tensors = output.new_prompt_logprobs_tensors[:3]
                self.prompt_logprobs: Any = tuple(each.numpy() for each in tensors)
            if output.prompt_token_id_logprobs is not None:
                self.prompt_token_id_logprobs = output.prompt_token_id_logprobs.numpy()
            if output.new_logprobs is not None and self.logprobs is not None:
                self.logprobs.blocks.append((output.new_logprobs[0], output.new_logprobs[1]))

        def pop_prompt_logprobs(self) -> Any:
            """Returns the prompt's rows once. vLLM calls it after each delta output: rows already emitted are dropped."""
            rows: Any = self.prompt_logprobs
            self.prompt_logprobs = None
            if self.logprobs is not None:
                self.logprobs = RawRows()
            return rows

    return RawLogprobsProcessor
