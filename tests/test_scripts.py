"""The scripts of the developers' commands: messages of commits, the check of a release, the lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.commit_message import problems
from scripts.lock import closure, differences
from scripts.release import changelog_problems, git_problems

ROOT = Path(__file__).resolve().parents[1]
RELEASED = "# Changelog\n\n## 1.2.0 (2026-01-31)\n\n- Faster.\n\n## 1.1.0 (2025-12-01)\n\n- First.\n"


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("Add a lock\n\nBecause versions drift.\n# a comment of git\n", []),
        ("a" * 72, []),
        ("a" * 73, ["73 characters"]),
        ("Add a lock.\nBecause", ["full stop", "second line"]),
        ("# only comments\n", ["empty"]),
        ("Merge branch 'a very long name " + "a" * 72, []),
    ],
)
def test_a_subject_is_short_and_apart_from_its_body(message: str, found: list[str], tmp_path: Path) -> None:
    sentences = problems(message)
    assert len(sentences) == len(found)
    assert all(part in sentence for part, sentence in zip(found, sentences, strict=True))
    (tmp_path / "message").write_text(message)
    command = [sys.executable, "scripts/commit_message.py", str(tmp_path / "message")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == bool(found)


@pytest.mark.parametrize(
    ("changelog", "version", "found"),
    [
        (RELEASED, "1.2.0", []),
        (RELEASED, "1.3.0", ["starts with 1.2.0, pyproject.toml says 1.3.0"]),
        (RELEASED.replace("2026-01-31", "unreleased"), "1.2.0", ["dates 1.2.0 as unreleased"]),
        (RELEASED.replace("- Faster.\n", ""), "1.2.0", ["says nothing about 1.2.0"]),
        (RELEASED.replace("1.2.0", "1.2"), "1.2", ["not of the form"]),
    ],
)
def test_a_release_needs_its_section_of_the_changelog(changelog: str, version: str, found: list[str]) -> None:
    sentences = changelog_problems(changelog, version)
    assert len(sentences) == len(found)
    assert all(part in sentence for part, sentence in zip(found, sentences, strict=True))


def test_a_release_is_of_a_clean_tree_whose_tag_is_free_or_its_own(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.hooksPath=/dev/null"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "zero")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    assert "not committed" in git_problems(tmp_path, "1.2.0")[0]
    git("commit", "-m", "one")
    assert git_problems(tmp_path, "1.2.0") == []
    git("tag", "v1.2.0")
    assert "tagged v1.2.0" in git_problems(tmp_path, "1.2.1")[0]
    assert git_problems(tmp_path, "1.2.0") == []
    git("commit", "--allow-empty", "-m", "two")
    assert "on another commit" in git_problems(tmp_path, "1.2.0")[0]
    assert git_problems(tmp_path, "1.2.1") == []


def test_the_lock_follows_requirements_with_their_extras_and_markers() -> None:
    found = closure(["pytest>=8", "httpx[nothing]; python_version < '3'"])
    assert found.keys() >= {"pytest", "pluggy", "iniconfig", "packaging"}
    assert "httpx" not in found


def test_the_lock_is_compared_package_by_package() -> None:
    found = differences({"a": "1", "b": "2", "c": "3"}, {"b": "2", "c": "4", "d": "5"})
    assert len(found) == 3
    assert found[0].startswith("a 1 is not in the lock")
    assert found[1].startswith("d is in the lock, but nothing requires it")
    assert found[2].startswith("c is 3 here and 4 in the lock")
