"""Result of a training process that ended without an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of a training process and its last step."""

    kind: Literal["completed", "stopped"]
    step: int
