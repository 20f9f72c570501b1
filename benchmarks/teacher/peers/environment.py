"""Environment of the peers that the teacher is compared with, built by the benchmark apart from the project's own.

It sees the project's packages, so that both sides run the same vLLM and torch, and adds the peers; nothing is
installed into the project's environment.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

TRL = "trl==1.16.0"
VLLM_GRPC = "smg-grpc-servicer==0.14.1"
IMPORTS = {
    TRL: "trl.generation.vllm_client",
    VLLM_GRPC: "vllm.entrypoints.launchers.grpc_server",
}
"""Modules that a peer needs."""
DIRECTORY = Path(__file__).parents[3] / ".bench" / "peers"
INSTALL_TIMEOUT_S = 600
IMPORT_TIMEOUT_S = 180


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """Peers that can run here."""

    python: Path
    missing: dict[str, str]
    """Requirement to the reason for its absence."""


def prepare(
    log: Callable[[str], None], requirements: Collection[str] = IMPORTS, directory: Path = DIRECTORY
) -> Peers:
    """Builds the environment with `requirements` on the first call for this interpreter; a peer may be missing."""
    packages = sysconfig.get_path("purelib")
    wanted = "\n".join((sys.version, packages, *IMPORTS))
    home = directory / hashlib.sha256(wanted.encode()).hexdigest()[:12]
    python = home / "bin" / "python"
    missing = {}
    for requirement, module in IMPORTS.items():
        done = home / f"{requirement}.done"
        if requirement not in requirements or done.exists():
            continue
        if not python.exists():
            venv.create(home, with_pip=True)
            relative = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
            (home / relative / "project.pth").write_text(packages + "\n")
        log(f"installing {requirement} into {home}")
        pip: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "requests",
            requirement,
        ]
        problem = _run(pip, INSTALL_TIMEOUT_S) or _run([python, "-c", f"import {module}"], IMPORT_TIMEOUT_S)
        if problem:
            missing[requirement] = problem
            log(f"{requirement} cannot run here: {problem}")
        else:
            done.touch()
    return Peers(python=python, missing=missing)


def _run(command: Sequence[str | Path], timeout_s: float) -> str:
    """Runs a command; returns the last line of its errors, empty for success."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
