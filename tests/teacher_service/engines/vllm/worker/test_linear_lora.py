"""Adapters of linear layers, a pair of matmuls for each, against vLLM's own products row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse.teacher_service.engines.vllm.worker.linear_lora import (
    _regrouping,
    by_adapter,
    embedding_by_adapter,
)

pytest.importorskip("vllm", reason="vllm is not installed")

IDS = [11, 13, None]
"""Adapters of the slots; the last one stays empty."""
HIDDEN, RANK, SLICES = 24, 4, (16, 8, 8)


def adapter_of(rows: list[int], wrapper: Any, update: Any, *, is_prefill: bool) -> None:
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(tuple(rows), tuple(rows), is_prefill=is_prefill)
    update(wrapper, mapping, IDS, len(IDS), 100)


def stacks(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    a = tuple(torch.randn(len(IDS), 1, RANK, HIDDEN, generator=generator).to(dtype) for _ in SLICES)
    b = tuple(torch.randn(len(IDS), 1, width, RANK, generator=generator).to(dtype) for width in SLICES)
    for each in (*a, *b):
        each[-1] = 0
    return a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_prefill", [True, False])
def test_each_row_gets_what_its_adapter_adds(*, dtype: torch.dtype, is_prefill: bool) -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    original = PunicaWrapperCPU.add_lora_linear
    ours, update = by_adapter(original), _regrouping(PunicaWrapperBase.update_metadata)
    wrapper = PunicaWrapperCPU(64, 8, "cpu")
    a, b = stacks(dtype)
    for rows in ([11] * 6, [13, 13, 11, 0, 11], [0, 0], [0, 13], [13]):
        adapter_of(rows, wrapper, update, is_prefill=is_prefill)
        x = torch.randn(len(rows), HIDDEN).to(dtype)
        y = torch.randn(len(rows), sum(SLICES)).to(dtype)
        found, expected = y.clone(), y.clone()
        original(wrapper, expected, x, a, b, 0.5, SLICES)
        ours(wrapper, found, x, a, b, 0.5, SLICES)
        none = torch.tensor([row == 0 for row in rows])
        torch.testing.assert_close(found[none], y[none], rtol=0, atol=0)
        torch.testing.assert_close(
            found,
            expected,
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-1 if dtype == torch.bfloat16 else 1e-5,
        )
        if not none.all():
            assert not torch.equal(found, y)


def test_embeddings_get_what_their_rows_adapters_add() -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    original = PunicaWrapperCPU.add_lora_embedding
    ours, update = embedding_by_adapter(original), _regrouping(PunicaWrapperBase.update_metadata)
    wrapper = PunicaWrapperCPU(64, 8, "cpu")
    b = stacks(torch.float32)[1][0]
    for rows in ([11] * 3, [13, 0, 11]):
        adapter_of(rows, wrapper, update, is_prefill=False)
        x, y = torch.randn(len(rows), RANK), torch.randn(len(rows), b.shape[2])
        found, expected = y.clone(), y.clone()
        original(wrapper, expected, x, b)
        ours(wrapper, found, x, b)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_with_rows_of_its_own_keeps_vllms_products() -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    called: list[int] = []
    ours = by_adapter(lambda *arguments, **_: called.append(len(arguments[2])))
    wrapper = PunicaWrapperCPU(64, 8, "cpu")
    adapter_of([11, 11, 13], wrapper, _regrouping(PunicaWrapperBase.update_metadata), is_prefill=False)
    a, b = stacks(torch.float32)
    ours(wrapper, torch.zeros(2, sum(SLICES)), torch.zeros(2, HIDDEN), a, b, 1.0, SLICES)
    assert called == [2]
