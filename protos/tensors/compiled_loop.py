"""Compilation of loops over arrays with numba, kept for later processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import numba


def compiled_loop(function: Callable[..., Any], **settings: Any) -> Any:
    """Compiles a function, without the interpreter's lock, cached beside its source or in the user's cache directory where writable.

    What is cached is of use while no file has changed of this function and of those that it may call: numba looks at the first
    alone, whose code has the others' in it. `settings` are further ones of `numba.njit`.
    """
    try:
        compiled = numba.njit(cache=True, nogil=True, **settings)(function)
    except RuntimeError:
        return numba.njit(nogil=True, **settings)(function)
    with suppress(AttributeError, OSError):  # numba's own stamp, from a version with other names
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _times(function))
    return compiled


def _times(function: Callable[..., Any]) -> list[tuple[str, int, int]]:
    """Names, modification times and sizes of the files whose compiled code the function can reach by its module's names."""
    files, seen, modules = set(), set(), [function.__globals__]
    while modules:
        names = modules.pop()
        if id(names) not in seen:
            seen.add(id(names))
            reached = [
                source
                for each in names.values()
                if type(each).__module__.startswith("numba.")
                # Of compiled functions, and of intrinsics.
                and isinstance(source := getattr(each, "py_func", getattr(each, "_defn", None)), FunctionType)
            ]
            files |= {Path(each.__code__.co_filename) for each in reached}
            modules += [each.__globals__ for each in reached]
    return sorted((each.name, each.stat().st_mtime_ns, each.stat().st_size) for each in files)
