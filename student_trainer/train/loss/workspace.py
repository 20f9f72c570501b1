"""Memory that the fused objective uses in every call: kept from one to the next on a CPU, and never seen outside of a call.

The kernel hands a process fresh memory page by page and cleared, and takes large pieces back when they are freed: at
half a gigabyte in each step that is a twentieth of its time. On a GPU torch keeps freed memory by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Large tensors by name; what they hold when they are handed out is arbitrary. For one call at a time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor like torch.empty's, in the memory that had this name before if that is of this type and large enough."""
        size = torch.Size(shape).numel()
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        kept = self._kept.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < size:
            # The old one goes first: both at once would be the peak.
            self._kept.pop(name, None)
            kept = self._kept[name] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)
