"""What is free in the heap goes back to the host."""

from __future__ import annotations

import ctypes
import time

import psutil
import pytest

from stillhouse.teacher_service.engines.vllm.worker.malloc_trim import trim_regularly

PIECE_BYTES, PIECES = 64 << 10, 2048  # too small for a mapping of their own


def test_free_memory_between_used_pieces_goes_back_to_the_host() -> None:
    library = ctypes.CDLL(None)
    if getattr(library, "malloc_trim", None) is None:
        pytest.skip("this C library has no malloc_trim")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    pieces = [library.malloc(PIECE_BYTES) for _ in range(PIECES)]
    for piece in pieces:
        ctypes.memset(piece, 1, PIECE_BYTES)
    kept, free = pieces[::8], [piece for number, piece in enumerate(pieces) if number % 8]
    for piece in free:
        library.free(piece)
    process = psutil.Process()
    before = process.memory_info().rss
    ended = trim_regularly(0.05)
    assert ended is not None
    deadline = time.monotonic() + 10
    while process.memory_info().rss > before - len(free) * PIECE_BYTES // 2:
        assert time.monotonic() < deadline, "the heap was not trimmed"
        time.sleep(0.05)
    for piece in kept:
        library.free(piece)
    ended.set()
