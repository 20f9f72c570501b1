"""The type in which products are computed on a CPU: float32 where the processor is no faster in half precision.

Torch computes a product of half precision on any processor. Without instructions for it that takes many times as long as
the same product in float32, and with those of AVX-512 alone it takes up to twice as long on some processors and half
as long on others. So the products are timed once in a process, by the processor time of one thread: that of the wall would
depend on what else the machine does, and a run that is resumed must choose as before. Float32 is more exact as well, and
wins a tie.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_HALF = (torch.bfloat16, torch.float16)
_ROWS, _INNER, _COLUMNS = 120, 248, 4072
"""A product of 0.24 GFLOP: a few milliseconds. oneDNN may keep one thread for its shape, which no model is likely to have."""
_TRIES = 6
_FASTER = 0.8
"""Half precision must take this share of float32's time or less. The processors known lie near 0.5 or above 1.5."""


def product_type(dtype: torch.dtype, device: str) -> torch.dtype:
    """`dtype`, or float32 where the type of device ("cpu", "cuda") computes no faster in it. The same all through a process."""
    return torch.float32 if device == "cpu" and dtype in _HALF and not _is_faster(dtype) else dtype


@cache
def _is_faster(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are well faster than those of float32, by the fastest of a few of each in turn."""
    if not _has_product(dtype):
        return False
    half, wide = _factors(dtype), _factors(torch.float32)
    with one_thread():
        seconds = [(_seconds(*half), _seconds(*wide)) for _ in range(1 + _TRIES)][1:]
    return min(one for one, _ in seconds) <= _FASTER * min(other for _, other in seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes with this thread alone, whose processor time is then that of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Ones: drawn numbers would move the run's own random state."""
    return torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_COLUMNS, _INNER, dtype=dtype)


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    begin = time.thread_time()
    torch.mm(left, right.T)
    return time.thread_time() - begin


def _has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which torch leaves such products to, has one for this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
