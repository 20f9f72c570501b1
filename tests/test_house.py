"""The rules of the tree: small folders, small files, one-line rooms, plain openings, tests where the code is."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("protos", "teacher_service", "student_trainer", "client")
FOLDERS = (*PACKAGES, "benchmarks", "examples", "scripts", "tests")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$|\.proto$")
# The generated stubs of the contract lie where protoc puts them; revisions of the database are named by their number.
EXEMPT = {"protos/stillhouse", "protos/stillhouse/v1", "student_trainer/runs/store/migrations/versions"}
OWN_ROOMS = {
    "tests/benchmarks",
    "tests/client/web/browser",
    "tests/compat",
    "tests/compatibility",
    "tests/faults",
    "tests/fuzz",
    "tests/integration",
    "tests/support",
}
MAX_FILES = 16
MAX_LINES = 400
MAX_SHARED_PREFIX = 2
MAX_SHARE_OF_RIDDLES = 0.02
RIDDLE = re.compile(r"\s*(What|Who|Whom|Whose|Which|Whether|How|When|Where|Why|Of)\b")


def test_a_folder_has_few_files() -> None:
    large: dict[str, int] = {}
    for folder in _folders():
        count = sum(path.is_file() and path.name != "__init__.py" for path in _visible(folder))
        if count > MAX_FILES and _name(folder) not in EXEMPT:
            large[_name(folder)] = count
    assert large == {}


def test_a_file_has_few_lines() -> None:
    lines = {_name(path): len(path.read_text().splitlines()) for path in _files()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_files_of_a_folder_share_no_prefix() -> None:
    """Three files with a prefix are a folder; tests begin with test_, and their names are those of what they test."""
    shared: dict[str, int] = {}
    for folder in _folders():
        if _name(folder) in EXEMPT or folder.parts[len(ROOT.parts)] == "tests":
            continue
        names = [path.stem for path in _visible(folder) if path.suffix == ".py"]
        prefixes = Counter(name.partition("_")[0] for name in names if "_" in name.strip("_"))
        shared |= {f"{_name(folder)}/{prefix}_": n for prefix, n in prefixes.items() if n > MAX_SHARED_PREFIX}
    assert shared == {}


def test_a_room_says_in_one_line_what_it_is() -> None:
    wrong = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            body = ast.parse(path.read_text()).body
            one_line = len(body) == 1 and path.read_text().count("\n") == 1
            if (
                not (one_line and ast.get_docstring(ast.parse(path.read_text())))
                and _name(path.parent) not in EXEMPT
            ):
                wrong.append(_name(path))
    assert wrong == []


def test_docstrings_open_with_their_subject() -> None:
    docstrings = [text for path in _files() for text in _docstrings(ast.parse(path.read_text()))]
    riddles = [text.strip().splitlines()[0] for text in docstrings if RIDDLE.match(text)]
    assert len(riddles) < MAX_SHARE_OF_RIDDLES * len(docstrings), "\n".join(riddles)


def test_packages_are_imported_by_their_one_name() -> None:
    wrong = []
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            wrong += [f"{_name(path)}:{node.lineno}" for name in names if name.partition(".")[0] in PACKAGES]
    assert wrong == []


def test_tests_lie_in_the_rooms_of_what_they_test() -> None:
    lost = []
    for folder in _folders():
        name = _name(folder)
        if not name.startswith("tests/") or any(f"{name}/".startswith(f"{room}/") for room in OWN_ROOMS):
            continue
        if not (ROOT / name.removeprefix("tests/")).is_dir() and name != "tests/protos/contract":
            lost.append(name)
    assert lost == []


@pytest.mark.parametrize(
    ("text", "is_riddle"), [("What it is.", True), ("Oftener read.", False), ("Reads.", False)]
)
def test_a_riddle_is_told_from_a_subject(text: str, is_riddle: bool) -> None:
    assert bool(RIDDLE.match(text)) == is_riddle


def _folders() -> Iterator[Path]:
    for name in FOLDERS:
        for folder in [ROOT / name, *(path for path in (ROOT / name).rglob("*") if path.is_dir())]:
            if "__pycache__" not in folder.parts and any(_visible(folder)):
                yield folder


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__"))]


def _files() -> Iterator[Path]:
    """Every Python file that is written by hand."""
    yield ROOT / "stillhouse/__init__.py"
    for name in FOLDERS:
        yield from (path for path in sorted((ROOT / name).rglob("*.py")) if not GENERATED.search(path.name))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _docstrings(tree: ast.AST) -> Iterator[str]:
    """Strings that stand as statements: docstrings of modules, classes and functions, and those below attributes."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.value
