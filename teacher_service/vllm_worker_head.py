"""The output layer inside vLLM's worker, for rows of prompts, each with the adapter that its own token has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Head = Callable[[Tensor, Tensor], Tensor | None]
"""(hidden states [T, H], places of their tokens in the step's batch [T]) to logits [T, V], None on ranks without them."""


def output_layer(runner: Any) -> tuple[Head, int | None]:
    """The layer, and how many rows it takes at once where that is bounded.

    In models whose output layer takes adapters, vLLM expects one row for each request of a step, and looks up the
    adapters of so many. For other rows than these the lookup has to be set. On GPUs that has not been run.
    """
    wrapper = _lookup(runner.model)
    if wrapper is None:
        return (lambda hidden_TH, places_T: runner.model.compute_logits(hidden_TH)), None  # noqa: ARG005

    def with_adapters(hidden_TH: Tensor, places_T: Tensor) -> Any:
        before, num_before = wrapper.sampler_indices.clone(), wrapper.indices_len[1]
        try:
            _set(wrapper, wrapper._token_lora_indices[places_T], len(places_T))
            return runner.model.compute_logits(hidden_TH)
        finally:
            _set(wrapper, before, num_before)

    return with_adapters, runner.max_num_reqs if hasattr(wrapper, "prompt_mapping_meta") else None


def _lookup(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__ == "LogitsProcessorWithLoRA":
            return module.punica_wrapper
    return None


def _set(wrapper: Any, indices: Tensor, count: int) -> None:
    wrapper._sampler_indices[: len(indices)] = indices
    wrapper.indices_len[1] = count
    if hasattr(wrapper, "prompt_mapping_meta"):
        wrapper.prompt_mapping_meta.prepare_tensors(wrapper.sampler_indices)
