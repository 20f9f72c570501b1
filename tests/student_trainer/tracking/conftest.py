"""The libraries of trackers in an environment of their own, on top of this one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.environments.overlay import make_environment

Libraries = Mapping[str, Path]
"""Kind of tracker to the folder that brings its library when it is on PYTHONPATH."""
TOGETHER = ("wandb", "mlflow-skinny", "trackio")
ALONE = ("swanlab",)
"""Its protobuf is older than what this environment's gRPC needs: a process with it serves nothing here."""


@pytest.fixture(scope="session")
def tracker_libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """The libraries."""
    together, alone = (
        _installed(tmp_path_factory.mktemp("trackers-env"), packages) for packages in (TOGETHER, ALONE)
    )
    return {"wandb": together, "mlflow": together, "trackio": together, "swanlab": alone}


def _installed(root: Path, packages: Sequence[str]) -> Path:
    made = make_environment(root, packages)
    if isinstance(made, str):
        pytest.skip(made)
    return made.purelib
