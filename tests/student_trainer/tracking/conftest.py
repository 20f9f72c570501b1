"""The libraries of trackers in an environment of their own, on top of this one's."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

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
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=100)
    python = root / "bin" / "python"
    purelib = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(purelib) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *packages],
        capture_output=True,
        check=False,
        timeout=500,
    )
    if done.returncode:
        pytest.skip(f"{packages[0]} is not installed")
    return Path(purelib)
