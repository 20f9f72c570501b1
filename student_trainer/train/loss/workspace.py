"""Reused memory of the fused objective: kept between calls on a CPU, never visible outside of a call.

The kernel hands a process fresh memory page by page, zeroed, and takes large blocks back when they are freed: at half
a gigabyte in each step that costs a twentieth of its time. On a GPU torch caches freed memory automatically.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Large tensors by name, uninitialised when handed out. For one call at a time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an uninitialised tensor, in the memory of the last one of this name if its dtype and size allow it."""
        size = torch.Size(shape).numel()
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        kept = self._kept.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < size:
            # The old one is freed first: both at once would be the peak.
            self._kept.pop(name, None)
            kept = self._kept[name] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)
