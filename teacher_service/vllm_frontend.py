"""Keeps rows as the arrays that they came as in vLLM's front end, which otherwise makes a Python object of every number.

It puts a class of its own in the place of `LogprobsProcessor` in `vllm.v1.engine.output_processor`, for requests that
carry Stillhouse's argument; all others get vLLM's.
"""

from __future__ import annotations

import inspect
from typing import Any

from teacher_service.vllm_plan import KEY

_PARTS = ("logprobs", "prompt_logprobs", "cumulative_logprob", "num_logprobs", "num_prompt_logprobs")


class RawRows(list[Any]):
    """(ids, values) of each written token that was not given out; a slice of it is given out and forgotten."""

    def __getitem__(self, index: Any) -> Any:
        rows = list.__getitem__(self, index)
        if isinstance(index, slice):
            del self[index]
        return rows


def install() -> str:
    """Puts the class in its place, once. Returns why it cannot, or nothing."""
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
        """What `RequestState` asks of a processor, with nothing turned into objects."""

        stillhouse = True

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
            """Keeps the arrays of one step."""
            if output.new_prompt_logprobs_tensors is not None:
                ids, values, *_ = output.new_prompt_logprobs_tensors
                self.prompt_logprobs: Any = (ids.numpy(), values.numpy())
            if output.prompt_token_id_logprobs is not None:
                self.prompt_token_id_logprobs = output.prompt_token_id_logprobs.numpy()
            if output.new_logprobs is not None and self.logprobs is not None:
                self.logprobs.extend(zip(output.new_logprobs[0], output.new_logprobs[1], strict=True))

        def pop_prompt_logprobs(self) -> Any:
            """The rows of the prompt, once."""
            rows: Any = self.prompt_logprobs
            self.prompt_logprobs = None
            return rows

    return RawLogprobsProcessor
