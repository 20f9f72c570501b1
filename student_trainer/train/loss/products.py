"""Large float32 matmuls on a CPU: by oneDNN on processors that prefer it, else by torch's BLAS. Without gradients.

Axes: M, N rows of both operands, K their common columns.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.protos.telemetry.processor import Processor

LEAST_TERMS = 2**20
"""Multiplications from which on oneDNN's start does not matter."""
BLOCK_ELEMENTS, BLOCK_ROWS = 5 * 2**20, 128
"""Elements of a result that is computed at a time, since oneDNN writes to memory of its own, and rows of it at least."""
MAX_TURNED = 2**24
"""Elements of a result up to which it is computed with its axes turned."""


def uses_onednn(left: Tensor, right: Tensor) -> bool:
    """True if `by_onednn` is for these operands."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and len(left) * right.numel() >= LEAST_TERMS
        and _is_preferred()
    )


def by_onednn(left: Float[Tensor, "M K"], right: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """Computes left @ right.T in new memory."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return result


def multiply(left: Float[Tensor, "M K"], right: Float[Tensor, "N K"], *, out: Float[Tensor, "M N"]) -> None:
    """Overwrites `out` with left @ right.T."""
    if not uses_onednn(left, right):
        torch.mm(left, right.T, out=out)
        return
    size = max(BLOCK_ROWS, BLOCK_ELEMENTS // len(right))
    for first in range(0, len(left), size):
        rows = slice(first, first + size)
        out[rows] = by_onednn(left[rows], right)


def add_product(
    left: Float[Tensor, "K M"], right: Float[Tensor, "K N"], *, out: Float[Tensor, "M N"], overwrite: bool
) -> None:
    """Adds left.T @ right to `out`, or overwrites it."""
    turned = right.T
    if out.dtype != torch.float32 or out.numel() > MAX_TURNED or not uses_onednn(turned, left.T):
        out.addmm_(left.T, right, beta=0.0 if overwrite else 1.0)
        return
    # The other way round `left` would be copied with its axes turned first.
    share = by_onednn(turned.contiguous(), left.T).T
    if overwrite:
        out.copy_(share)
    else:
        out.add_(share)


@cache
def _is_preferred() -> bool:
    return Processor.read().prefers_onednn and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
