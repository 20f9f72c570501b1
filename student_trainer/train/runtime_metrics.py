"""How a training process fares besides what it learns: what teachers owe it and left undone, what caches knew, what memory it holds."""

from __future__ import annotations

import torch

from stillhouse.student_trainer.train.teacher.offline_teachers import StoredTeachers
from stillhouse.student_trainer.train.teacher.teachers import Teachers


def vitals(teachers: Teachers | StoredTeachers | None, device: torch.device) -> dict[str, float]:
    """At present, by the names of metrics."""
    found = teachers.metrics() if teachers is not None else {}
    if device.type == "cuda":
        found["device/memory_bytes"] = float(torch.cuda.memory_reserved(device))
        found["device/memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return found
