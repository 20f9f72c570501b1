"""The libraries of trackers in an environment of their own, on top of this one's."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PACKAGES = ("wandb", "mlflow-skinny", "trackio", "swanlab")


@pytest.fixture(scope="session")
def tracker_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that brings the libraries when it is on PYTHONPATH."""
    root = tmp_path_factory.mktemp("trackers-env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=100)
    python = root / "bin" / "python"
    purelib = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(purelib) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *PACKAGES],
        capture_output=True,
        check=False,
        timeout=500,
    )
    if done.returncode:
        pytest.skip("wandb is not installed")
    return Path(purelib)
