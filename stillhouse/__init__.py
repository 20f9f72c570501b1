"""Distils a large language model into a small one: `from stillhouse import Teacher, Trainer` is the public API.

The four packages lie at the top of the repository; here they are links. Names are imported when they are first used, so
that a service does not load the client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.client.api import *  # noqa: F403

_API = "stillhouse.client.api"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
    api = importlib.import_module(_API)
    if name not in api.__all__:
        raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(
        [*importlib.import_module(_API).__all__, "client", "protos", "student_trainer", "teacher_service"]
    )
