"""One copy from device to host for each step, of all arrays that leave in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_NUMPY = {torch.int32: np.int32, torch.float32: np.float32, torch.float16: np.float16}


class StepCopy:
    """Tensors of one step, which leave the device together.

    `add` while the step is computed, `start` once it is launched, and `arrays` after the step's own copy has been waited
    for: vLLM's `AsyncOutput` does both, on its copy stream, which follows the work launched before.
    """

    def __init__(self) -> None:
        self._added: list[Sequence[Tensor]] = []
        self._flat: Tensor | None = None
        self._host: list[list[Array]] = []
        self._event: Any = None

    def add(self, tensors: Sequence[Tensor]) -> int:
        """Adds tensors of int32, float32 or float16; returns the key for `arrays`."""
        self._added.append(tensors)
        return len(self._added) - 1

    def join(self) -> None:
        """Lays out all bytes in one tensor, on the stream that computed them. Nothing can be added afterwards."""
        if self._flat is None and self._added:
            every = [each for tensors in self._added for each in tensors]
            # Four bytes first, so that views of them are aligned.
            ordered = sorted(every, key=lambda each: -each.element_size())
            self._flat = torch.cat([each.reshape(-1).view(torch.uint8) for each in ordered])

    def start(self) -> None:
        """Starts the copy on the current stream, once."""
        self.join()
        if self._host or self._flat is None:
            return
        host = self._flat.to("cpu", non_blocking=True)
        if self._flat.device.type != "cpu":
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()
        data = host.numpy()
        places = sorted(
            ((key, at) for key, tensors in enumerate(self._added) for at in range(len(tensors))),
            key=lambda place: -self._added[place[0]][place[1]].element_size(),
        )
        self._host = [[np.empty(0)] * len(tensors) for tensors in self._added]
        offset = 0
        for key, at in places:
            tensor = self._added[key][at]
            size = math.prod(tensor.shape) * tensor.element_size()
            view = data[offset : offset + size].view(_NUMPY[tensor.dtype])
            self._host[key][at] = view.reshape(tensor.shape)
            offset += size

    def wait(self) -> None:
        """Waits for the copy, which has been started, and for nothing launched after it."""
        if self._event is not None:
            self._event.synchronize()

    def arrays(self, key: int) -> list[Array]:
        """Arrays of one `add`; their contents are there after `wait`."""
        return self._host[key]
