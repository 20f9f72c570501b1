"""The order of the run service to a standby process: the attempt that it shall train."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MODULE = "stillhouse.student_trainer.train.standby"
"""Module that runs as a standby process."""
ADAPTER_VARIABLE = "STILLHOUSE_STANDBY_ADAPTER"
"""Environment variable of a standby process that imports what trains an adapter too; it removes it."""
TAKEN = b"\n"
"""Its reply once it has taken the attempt's place; after that nothing of it is left that waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """An attempt of a run."""

    run_dir: Path
    attempt: int
    halve: bool
    """Half the micro-batch, as HALVE_VARIABLE in the environment of a process that is started for the attempt."""

    def line(self) -> bytes:
        """The order as a line of JSON."""
        value = {"run_dir": str(self.run_dir), "attempt": self.attempt, "halve": self.halve}
        return json.dumps(value).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """The order of a line."""
        value = json.loads(line)
        return cls(run_dir=Path(value["run_dir"]), attempt=int(value["attempt"]), halve=bool(value["halve"]))
