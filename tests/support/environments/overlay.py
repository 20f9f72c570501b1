"""Virtual environments with packages of their own on top of this one's libraries."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INSTALL_TIMEOUT_S = 500


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment."""

    python: Path
    purelib: Path
    """The folder of its own packages."""


def make_environment(root: Path, *installs: Sequence[str]) -> Environment | str:
    """The environment in `root`, with each of `installs` given to pip; or why there is none."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=100)
    python = root / "bin" / "python"
    purelib = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(purelib) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for packages in installs:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *packages],
            capture_output=True,
            check=False,
            timeout=INSTALL_TIMEOUT_S,
        )
        if done.returncode:
            return f"{' '.join(packages)} cannot be installed here: {done.stderr.decode()[-200:]}"
    return Environment(python, Path(purelib))
