"""Free heap memory goes back to the host."""

from __future__ import annotations

import ctypes
import time

import psutil
import pytest

from stillhouse.teacher_service.engines.vllm.worker.malloc_trim import trim_regularly

CHUNK_BYTES, CHUNKS = 64 << 10, 2048  # too small for mappings of their own


def test_free_memory_between_used_chunks_goes_back_to_the_host() -> None:
    library = ctypes.CDLL(None)
    if getattr(library, "malloc_trim", None) is None:
        pytest.skip("this C library has no malloc_trim")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    chunks = [library.malloc(CHUNK_BYTES) for _ in range(CHUNKS)]
    for chunk in chunks:
        ctypes.memset(chunk, 1, CHUNK_BYTES)
    kept, free = chunks[::8], [chunk for number, chunk in enumerate(chunks) if number % 8]
    for chunk in free:
        library.free(chunk)
    process = psutil.Process()
    before = process.memory_info().rss
    ended = trim_regularly(0.05)
    assert ended is not None
    deadline = time.monotonic() + 60
    while process.memory_info().rss > before - len(free) * CHUNK_BYTES // 2:
        assert time.monotonic() < deadline, "the heap was not trimmed"
        time.sleep(0.05)
    for chunk in kept:
        library.free(chunk)
    ended.set()
