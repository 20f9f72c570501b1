"""Checks and builds a release: `release.py [--tag]`, with the Python of the developers' environment.

Rule: the version is written once, in pyproject.toml. It pushes and publishes nothing; that is done by the workflow that a
pushed tag starts. Without --tag it changes nothing but the folder dist/.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
HEADING = re.compile(r"^## (?P<version>\S+) \((?P<date>[^)]*)\)$", re.MULTILINE)


def main() -> int:
    """Prints the problems, or builds, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tag", action="store_true", help="make the annotated tag here; pushing it is yours")
    wants_tag = parser.parse_args().tag
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    found = [
        *changelog_problems((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version),
        *git_problems(ROOT, version),
    ]
    sys.stderr.writelines(f"release: {problem}\n" for problem in found)
    if found:
        return 1
    build()
    if wants_tag:
        _git(ROOT, "tag", "--annotate", f"v{version}", "--message", f"Stillhouse {version}")
        sys.stdout.write(f"release: tagged v{version}; `git push origin v{version}` publishes it\n")
    else:
        sys.stdout.write(f"release: {version} is ready; `make release TAG=1` makes the tag v{version} here\n")
    return 0


def changelog_problems(changelog: str, version: str) -> list[str]:
    """One sentence for each thing that the changelog lacks for a release of `version`."""
    found = []
    if not VERSION.fullmatch(version):
        found.append(f"the version {version} in pyproject.toml is not of the form 1.2.3 or 1.2.3rc1")
    heading = HEADING.search(changelog)
    if heading is None or heading["version"] != version:
        newest = heading["version"] if heading else "nothing"
        return [
            *found,
            f"CHANGELOG.md starts with {newest}, pyproject.toml says {version}; add `## {version} (date)`",
        ]
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", heading["date"]):
        found.append(f"CHANGELOG.md dates {version} as {heading['date']}; write the day as 2026-01-31")
    following = HEADING.search(changelog, heading.end())
    body = changelog[heading.end() : following.start() if following else None]
    if not body.strip():
        found.append(f"CHANGELOG.md says nothing about {version}; list what users will notice")
    return found


def git_problems(root: Path, version: str) -> list[str]:
    """One sentence for each thing that keeps the tree at `root` from being tagged as `version`."""
    found = []
    if _git(root, "status", "--porcelain"):
        found.append("the working tree has changes that are not committed")
    tag = f"v{version}"
    if tag in _git(root, "tag", "--list", tag).split():
        tagged, head = _git(root, "rev-list", "-n", "1", tag), _git(root, "rev-parse", "HEAD")
        if tagged != head:
            found.append(f"the tag {tag} exists, on another commit; raise the version in pyproject.toml")
    for other in set(_git(root, "tag", "--points-at", "HEAD", "--list", "v*").split()) - {tag}:
        found.append(f"this commit is tagged {other}, and pyproject.toml says {version}; remove the tag")
    return found


def build() -> None:
    """Fills dist/ with the source archive and with the wheel that is built from it."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    sdist = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", sdist, str(dist)], cwd=ROOT, check=True, capture_output=True
    )
    (archive,) = dist.iterdir()
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(dist), str(archive)),
        ],
        check=True,
    )
    for path in sorted(dist.iterdir()):
        sys.stdout.write(f"release: built {path.relative_to(ROOT)}\n")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
