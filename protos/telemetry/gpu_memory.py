"""GPU memory metrics, read from the driver without a CUDA context."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

from stillhouse.protos.telemetry.gpus import Gpu, list_gpus
from stillhouse.protos.telemetry.metrics import MetricSample

KEEP_S = 10.0
"""Age up to which a reading is used again: the page may be read often."""


class GpuMemory:
    """Takes the readings; called from the thread that serves the metrics page."""

    def __init__(self, only: Collection[int] | None = None) -> None:
        """`only`: indices of the devices to report; None reports all of the machine's."""
        self._only = only
        self._taken_at = -KEEP_S
        self._gpus: Sequence[Gpu] = ()

    def __call__(self) -> Iterator[MetricSample]:
        """Used and total bytes of each device; nothing without a driver that responds."""
        now = time.monotonic()
        if now - self._taken_at >= KEEP_S:
            self._taken_at = now
            self._gpus = list_gpus()
        for each in self._gpus:
            if self._only is None or each.index in self._only:
                labels = {"gpu": str(each.index)}
                yield MetricSample(
                    name="gpu_memory_used_bytes",
                    help="Memory of a device that is in use, by any process.",
                    value=each.used_bytes,
                    labels=labels,
                )
                yield MetricSample(
                    name="gpu_memory_total_bytes",
                    help="Memory of a device.",
                    value=each.total_bytes,
                    labels=labels,
                )
