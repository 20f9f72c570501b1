"""Adapters of linear layers and embeddings on a CPU: matmuls for all rows of an adapter at once.

vLLM's CPU build copies the adapter's matrices, padded to the largest rank that is allowed, for every row of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

_ADD = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"]
_EMBED = ["self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs"]
_UPDATE = ["self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"]

Groups = list[tuple[int, Tensor | None]]
"""Slots of a batch with the places of their rows; None where all rows are of one slot."""


def install() -> None:
    """Replaces vLLM's methods on a CPU, once. Raises ImportError, AttributeError or TypeError for an unknown vLLM."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms import current_platform

    add, update = PunicaWrapperCPU.add_lora_linear, PunicaWrapperCPU.update_metadata
    embed = PunicaWrapperCPU.add_lora_embedding
    if not current_platform.is_cpu() or getattr(add, "stillhouse", False):
        return
    for method, known in ((add, _ADD), (embed, _EMBED), (update, _UPDATE)):
        if list(inspect.signature(method).parameters) != known:
            raise TypeError(f"{method.__qualname__}{inspect.signature(method)}")
    PunicaWrapperCPU.add_lora_linear = by_adapter(add)
    PunicaWrapperCPU.add_lora_embedding = embedding_by_adapter(embed)
    PunicaWrapperCPU.update_metadata = _regrouping(update)


def by_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Builds the replacement of `add_lora_linear`, which adds each row's adapter to y [T, sum of slices] of rows x [T, H].

    Stacks are [slots, 1, R, H] and [slots, 1, slice, R]. Rows are shrunk in float32, and expanded in the dtype of y. A slot below 0
    stands for no adapter.
    """

    def add_lora_linear(  # noqa: PLR0917 - vLLM's signature
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        if buffer is not None or kwargs or not _is_whole_batch(self, y):
            named = {"buffer": buffer, **kwargs}
            original(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **named)
            return
        for slot, places_N in _groups(self):
            own_NH = (x if places_N is None else x[places_N]).float()
            begin = 0
            for a_SRH, b_SVR, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                shrunk_NR = scale * (own_NH @ a_SRH[slot, 0].float().T)
                _expand(y[:, begin : begin + width], places_N, shrunk_NR, b_SVR[slot, 0])
                begin += width

    add_lora_linear.stillhouse = True  # type: ignore[attr-defined]
    return add_lora_linear


def embedding_by_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Builds the replacement of `add_lora_embedding`, which expands x [T, R], already shrunk by each row's adapter, into y [T, H]."""

    def add_lora_embedding(
        self: Any, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        if not add_inputs or kwargs or not _is_whole_batch(self, y):
            original(self, y, x, lora_b_stacked, add_inputs, **kwargs)
            return
        for slot, places_N in _groups(self):
            own_NR = x if places_N is None else x[places_N]
            _expand(y, places_N, own_NR, lora_b_stacked[slot, 0])

    return add_lora_embedding


def _is_whole_batch(wrapper: Any, y: Tensor) -> bool:
    """True for rows that the look-up of adapters knows."""
    return y.dim() == 2 and len(y) == len(wrapper.token_lora_indices)


def _expand(y_TV: Tensor, places_N: Tensor | None, x_NR: Tensor, b_VR: Tensor) -> None:
    """Adds x B^T to the rows at the places, all if None, in the dtype of y."""
    added_NV = x_NR.to(y_TV.dtype) @ b_VR.to(y_TV.dtype).T
    if places_N is None:
        y_TV += added_NV
    else:
        y_TV.index_add_(0, places_N, added_NV)


def _regrouping(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `update_metadata`, after which rows are of other adapters."""

    def update_metadata(self: Any, *arguments: Any, **named: Any) -> None:
        self.stillhouse_groups = None
        original(self, *arguments, **named)

    return update_metadata


def _groups(wrapper: Any) -> Groups:
    """Groups the rows of the batch, once for all layers."""
    if getattr(wrapper, "stillhouse_groups", None) is None:
        slots_T = wrapper.token_lora_indices
        slots = slots_T.unique().tolist()
        wrapper.stillhouse_groups = [
            (slot, None if len(slots) == 1 else (slots_T == slot).nonzero().squeeze(1))
            for slot in slots
            if slot >= 0
        ]
    found: Groups = wrapper.stillhouse_groups
    return found
