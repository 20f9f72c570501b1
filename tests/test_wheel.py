"""The installed package: one top-level name, complete, and unharmed by a folder that has packages of the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".*",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    "site",
    "node_modules",
    "tests",
    "benchmarks",
    "examples",
)
PROGRAMS = {
    "stillhouse": "stillhouse.client",
    "stillhouse-teacher": "stillhouse.teacher_service",
    "stillhouse-trainer": "stillhouse.student_trainer.runs",
}
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
IMPORT_ALL = """
import stillhouse
from stillhouse import Teacher, Trainer
from stillhouse.client import api
for name in api.__all__:
    assert getattr(stillhouse, name) is getattr(api, name), name
    exec(f"from stillhouse import {name}")
assert (Teacher, Trainer) == (api.Teacher, api.Trainer)
print(stillhouse.__file__)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with the links in it, so that a build leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("tree") / "stillhouse"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_COPIED)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-W", "ignore", "-c", BUILD_SDIST, str(out), cwd=tree)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and sees the libraries of this one, but not the Stillhouse installed there.

    A folder named by a line in a .pth file comes last on the path, and its own .pth files, which make an editable
    install importable, are not read.
    """
    home = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    before = subprocess.run(
        [python, "-c", "import numpy, stillhouse"],
        cwd=home,
        env=_environment(),
        capture_output=True,
        check=False,
    )
    assert b"No module named 'stillhouse'" in before.stderr
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    return home


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder with packages named as Stillhouse's folders are; importing one of them ends the program."""
    for name in ("client", "protos", "tests", "teacher_service", "student_trainer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('imported the wrong {name}')\n")
    return tmp_path


def test_the_wheel_has_one_package_and_every_file_of_the_tree(tree: Path, wheel: Path) -> None:
    files = _contents(wheel)
    packaged = {name for name in files if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in packaged} == {"stillhouse"}
    # In the tree the four packages are links, which Path.rglob would not follow.
    of_tree = {
        (Path(folder) / name).relative_to(tree).as_posix()
        for folder, _, names in os.walk(tree / "stillhouse", followlinks=True)
        for name in names
        if not name.endswith((".pyc", ".md"))
    }
    assert packaged == of_tree
    endings = {name.rpartition(".")[2] for name in packaged}
    assert endings >= {"py", "pyi", "proto", "mako", "typed", "html", "css", "js", "svg"}
    with zipfile.ZipFile(wheel) as archive:
        links = [entry.filename for entry in archive.infolist() if entry.external_attr >> 28 == 0o12]
    assert links == []


def test_a_wheel_from_the_source_archive_has_the_same_files(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert not [entry.name for entry in archive if entry.issym() or entry.islnk()]
    assert _contents(_build_wheel(sdist, tmp_path)) == _contents(wheel)


@pytest.mark.parametrize("program", PROGRAMS)
def test_installed_programs_start_in_a_folder_with_packages_of_their_names(
    program: str, installed: Path, crowded: Path
) -> None:
    script = _run(installed / "bin" / program, "--help", cwd=crowded)
    module = _run(installed / "bin" / "python", "-m", PROGRAMS[program], "--help", cwd=crowded)
    assert "Usage:" in script
    assert script.partition("\n\n")[2] == module.partition("\n\n")[2]


def test_the_public_names_are_importable_in_a_folder_with_packages_of_the_same_names(
    installed: Path, crowded: Path
) -> None:
    found = _run(installed / "bin" / "python", "-c", IMPORT_ALL, cwd=crowded).strip()
    assert Path(found).is_relative_to(installed)


def _build_wheel(source: Path, out: Path) -> Path:
    """The wheel built from a folder or a source archive, without a network."""
    _run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", out, source),
        cwd=out,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def _contents(wheel: Path) -> dict[str, int]:
    """Name to checksum of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist() if not entry.is_dir()}


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a program and returns its stdout; fails with everything that it wrote if it does not end well."""
    done = subprocess.run(
        command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's environment without the paths that would lead back to the repository."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
