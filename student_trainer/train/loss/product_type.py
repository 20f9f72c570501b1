"""The type in which products are computed: a processor without instructions for half precision computes them in float32.

Torch computes a product of half precision on any processor, but without such instructions many times more slowly than
the same one in float32, which is more exact as well.
"""

from __future__ import annotations

from functools import cache

import torch

_HALF = (torch.bfloat16, torch.float16)


def product_type(dtype: torch.dtype, device: str) -> torch.dtype:
    """`dtype`, or float32 where the type of device ("cpu", "cuda") has no fast product of it."""
    return torch.float32 if device == "cpu" and dtype in _HALF and not _has_product(dtype) else dtype


@cache
def _has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which torch leaves such products to, has one for this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
