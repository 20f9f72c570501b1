"""Output-layer adapters on a CPU for prompts: vLLM expects one row per request there, and copies the adapter of each
row.

Prompts have many rows, and a copy has vocabulary times rank numbers. `install` gives the CPU build one matmul per
adapter instead, and looks adapters up for rows of prompts. Models whose output layer takes no adapters are
unaffected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_ADD = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs"]
_ROWS = ["self", "hidden_states", "num_scheduled_tokens"]


def lookup(model: Any) -> Any:
    """Wrapper that maps rows to adapters of the output layer; None for a model whose output layer takes none."""
    for module in model.modules():
        if type(module).__name__ == "LogitsProcessorWithLoRA":
            return module.punica_wrapper
    return None


@contextmanager
def looked_up(wrapper: Any, indices_T: Tensor) -> Iterator[None]:
    """Within the context, output-layer rows use the adapters of these slots [T], -1 for none."""
    before, num_before = wrapper.sampler_indices.clone(), wrapper.indices_len[1]
    try:
        _set(wrapper, indices_T, len(indices_T))
        yield
    finally:
        _set(wrapper, before, num_before)


def _set(wrapper: Any, indices_T: Tensor, count: int) -> None:
    wrapper._sampler_indices[: len(indices_T)] = indices_T
    wrapper.indices_len[1] = count
    if hasattr(wrapper, "prompt_mapping_meta"):
        wrapper.prompt_mapping_meta.prepare_tensors(wrapper.sampler_indices)


def install() -> None:
    """Replaces both methods on a CPU, once. Raises ImportError, AttributeError or TypeError for an unknown vLLM."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    rows = GPUModelRunner._get_prompt_logprobs_dict
    if not current_platform.is_cpu() or getattr(rows, "stillhouse", False):
        return
    for method, known in ((PunicaWrapperCPU.add_lora_logits, _ADD), (rows, _ROWS)):
        if list(inspect.signature(method).parameters) != known:
            raise TypeError(f"{method.__qualname__}{inspect.signature(method)}")
    PunicaWrapperCPU.add_lora_logits = add_lora_logits
    GPUModelRunner._get_prompt_logprobs_dict = _one_by_one(rows)


def add_lora_logits(  # noqa: PLR0917 - vLLM's signature
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: Tensor,
    lora_b_stacked: Tensor,
    scale: float,
    *,
    buffer: Tensor | None = None,  # noqa: ARG001
    **kwargs: Any,  # noqa: ARG001
) -> None:
    """Adds each row's adapter to logits y [T, padded V] of rows x [T, H], in float32.

    The stacks are [slots, 1, R, H] and [slots, 1, V, R]; a slot whose adapter leaves the output layer unchanged is
    zero.
    """
    indices_T = self.sampler_indices
    for slot in indices_T.unique().tolist():
        a_RH, b_VR = lora_a_stacked[slot, 0], lora_b_stacked[slot, 0]
        if slot >= 0 and a_RH.any():
            of_slot_T = indices_T == slot
            added_TV = x[of_slot_T].float() @ a_RH.float().T @ b_VR.float().T
            y[of_slot_T, : len(b_VR)] += (scale * added_TV).to(y.dtype)


def _one_by_one(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wraps vLLM's rows of prompts: one request at a time, with its own adapter looked up."""

    def get_prompt_logprobs_dict(
        self: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        wrapper = lookup(self.model) if self.num_prompt_logprobs else None
        if wrapper is None:
            return original(self, hidden_states, num_scheduled_tokens)
        every: dict[str, int] = self.num_prompt_logprobs
        results: dict[str, Any] = {}
        for name, width in list(every.items()):
            self.num_prompt_logprobs = {name: width}
            request, place = self.requests[name], self.input_batch.req_id_to_index.get(name, 0)
            begin = int(self.query_start_loc.np[place])
            rows = request.num_prompt_tokens - request.num_computed_tokens - 1
            count = max(0, min(num_scheduled_tokens.get(name, 0), rows))
            with looked_up(wrapper, wrapper._token_lora_indices[begin : begin + count]):
                results |= original(self, hidden_states, num_scheduled_tokens)
            if name not in self.num_prompt_logprobs:
                del every[name]
        self.num_prompt_logprobs = every
        return results

    get_prompt_logprobs_dict.stillhouse = True  # type: ignore[attr-defined]
    return get_prompt_logprobs_dict
