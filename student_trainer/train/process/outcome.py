"""The end of a training process that nothing went wrong in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the process ends."""

    kind: Literal["completed", "stopped"]
    step: int
