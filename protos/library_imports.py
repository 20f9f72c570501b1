"""Imports of large libraries, which leave millions of objects that live as long as the process."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module

MODEL_MODULES = (
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "torch._dynamo",
)
"""Modules that every program on transformers imports at the latest with its model and its first use."""


def import_modules(names: Iterable[str]) -> None:
    """Imports modules without the collector of cycles."""
    with collector_paused():
        for name in names:
            import_module(name)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the collector of cycles during imports, where it takes a quarter of the time, and keeps it off what they left behind."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
