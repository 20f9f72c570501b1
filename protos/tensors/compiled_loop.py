"""Compilation of loops over arrays with numba, kept for later processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled_loop(function: Callable[..., Any], **settings: Any) -> Any:
    """Compiles a function, without the interpreter's lock, cached beside its source or in the user's cache directory where writable.

    `settings` are further ones of `numba.njit`.
    """
    try:
        return numba.njit(cache=True, nogil=True, **settings)(function)
    except RuntimeError:
        return numba.njit(nogil=True, **settings)(function)
