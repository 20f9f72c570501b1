"""Runtime metrics: outstanding teacher requests, failures, cache hits, GPU memory."""

from __future__ import annotations

import torch

from stillhouse.student_trainer.train.teacher.target_source import TargetSource


def runtime_metrics(teachers: TargetSource, device: torch.device) -> dict[str, float]:
    """Present values by metric name."""
    found = teachers.metrics()
    if device.type == "cuda":
        found["device/memory_bytes"] = float(torch.cuda.memory_reserved(device))
        found["device/memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return found
