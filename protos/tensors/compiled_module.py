"""Compiled twins of this package's readers, where numba is installed."""

import sys
from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def compiled_module(name: str) -> ModuleType | None:
    """The module of this name beside this one; None without numba, as beside a client alone, or where bytes have another order."""
    if sys.byteorder != "little":
        return None
    try:
        return import_module(f"stillhouse.protos.tensors.{name}")
    except ImportError:
        return None
