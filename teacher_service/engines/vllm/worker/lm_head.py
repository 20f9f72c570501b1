"""Output layer inside vLLM's worker, for rows of prompts, each with its token's own adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stillhouse.protos.telemetry.processor import Processor
from stillhouse.teacher_service.engines.vllm.worker.lm_head_lora import looked_up, lookup

Head = Callable[[Tensor, Tensor], Tensor | None]
"""Maps (hidden states [T, H], their tokens' indices in the step's batch [T]) to logits [T, V]; None on ranks without
them."""

_PROBED_ROWS = 3


@dataclass(frozen=True, slots=True)
class SharedHead:
    """Thread-safe map of hidden states [T, H] to logits [T, V]."""

    weight: Tensor
    """[V, H]."""

    def __call__(self, hidden_TH: Tensor) -> Tensor:
        """Computes the logits."""
        if self.weight.dtype == torch.float32 and _prefers_onednn():
            logits_TV: Tensor = torch.ops.mkldnn._linear_pointwise(
                hidden_TH, self.weight, None, "none", [], ""
            )
            return logits_TV
        return torch.nn.functional.linear(hidden_TH, self.weight)


@cache
def _prefers_onednn() -> bool:
    return Processor.read().prefers_onednn and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def shared_output_layer(runner: Any) -> SharedHead | None:
    """The layer without adapters as one PyTorch matmul that any thread may run beside vLLM; None where it is more
    than that.

    vLLM's own matmuls on a CPU share a work buffer, so that no two may run concurrently. The plain one is compared on
    a few rows.
    """
    layer = getattr(runner.model, "lm_head", None)
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    vocab_size = runner.input_batch.vocab_size
    if runner.device.type != "cpu" or not isinstance(weight, Tensor):
        return None
    if weight.ndim != 2 or len(weight) < vocab_size:
        return None
    head = SharedHead(weight.detach()[:vocab_size])
    generator = torch.Generator().manual_seed(0)
    probe_TH = torch.randn(_PROBED_ROWS, weight.shape[1], generator=generator).to(weight.dtype)
    with torch.inference_mode():
        wanted_TV, found_TV = runner.model.compute_logits(probe_TH), head(probe_TH)
    if wanted_TV is None or wanted_TV.shape != found_TV.shape:
        return None
    difference = float((wanted_TV - found_TV).abs().max())
    return head if difference <= _rounding(probe_TH, head.weight, wanted_TV) else None


def _rounding(hidden_TH: Tensor, weight_VH: Tensor, logits_TV: Tensor) -> float:
    """Bound on the difference of two ways to compute a matmul: sums round in float32, results in their own type."""
    terms = float((hidden_TH.float().abs() @ weight_VH.float().abs().T).max())
    result = torch.finfo(logits_TV.dtype).eps * float(logits_TV.abs().max())
    return 4 * (result + torch.finfo(torch.float32).eps * terms)


def adapts_head(runner: Any, lora_request: Any) -> bool:
    """True if a request's adapter changes the output layer, or if that is unknown."""
    if lora_request is None:
        return False
    adapter = runner.lora_manager._adapter_manager.get_adapter(lora_request.lora_int_id)
    return adapter is None or any(name.endswith("lm_head") for name in adapter.loras)


def output_layer(runner: Any) -> tuple[Head, int | None]:
    """Returns the layer, and its limit of rows per call, None if unlimited.

    In models whose output layer takes adapters, vLLM expects one row per request of a step, and looks up as many
    adapters. Other rows need their own lookup. Not run on GPUs.
    """
    wrapper = lookup(runner.model)
    if wrapper is None:
        return (lambda hidden_TH, places_T: runner.model.compute_logits(hidden_TH)), None  # noqa: ARG005

    def with_adapters(hidden_TH: Tensor, places_T: Tensor) -> Any:
        with looked_up(wrapper, wrapper._token_lora_indices[places_T]):
            return runner.model.compute_logits(hidden_TH)

    return with_adapters, runner.max_num_reqs if hasattr(wrapper, "prompt_mapping_meta") else None
