"""Copies of arrays to a device that do not wait for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Returns a tensor of the array on `device`. On a CPU it may share the array's memory.

    Elsewhere the copy runs from pinned memory after the work queued before it; a copy from ordinary memory would wait
    for all of that.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
