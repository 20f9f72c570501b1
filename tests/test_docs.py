"""Truth of the texts: their links, paths, commands, flags, run files, settings and Python exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

import stillhouse
from scripts.reference.cli import PROGRAMS
from stillhouse.client.runfile.load import parse_run
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto
from tests.support.small_models import main as small_models

ROOT = Path(__file__).resolve().parents[1]
HISTORY = {"docs/log.md", "CHANGELOG.md"}
"""Texts about the past, whose names were true at their time."""
OTHER_FLAGS = {"--nnodes", "--attempt", "--spec", "--strict"}
"""Flags in running text that belong to torchrun, to the training process and to mkdocs."""
PLACE = "\0"
_FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def tracked() -> tuple[str, ...]:
    """Every file of the repository, and the new ones that git does not ignore."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(name for name in listed.stdout.split() if (ROOT / name).exists())


@cache
def product_code() -> str:
    """The product's code and contract, as one text."""
    rooms = ("client/", "protos/", "student_trainer/", "teacher_service/")
    return "".join(
        read(each) for each in tracked() if each.startswith(rooms) and each.endswith((".py", ".proto"))
    )


@cache
def sentences() -> tuple[str, ...]:
    """Every text in the product's code, with PLACE where a value is put in."""
    found = []
    for name in tracked():
        if name.startswith(("client/", "protos/", "student_trainer/", "teacher_service/")) and (
            name.endswith(".py") and "_pb2" not in name
        ):
            for node in ast.walk(ast.parse(read(name))):
                if isinstance(node, ast.JoinedStr):
                    parts = [each.value if isinstance(each, ast.Constant) else PLACE for each in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def texts() -> list[str]:
    """The Markdown files that speak of the present."""
    return [name for name in tracked() if name.endswith(".md") and name not in HISTORY]


@pytest.mark.parametrize("name", texts())
def test_every_link_leads_to_a_file(name: str) -> None:
    prose = _FENCE.sub("", read(name))
    targets = [each for each in _LINK.findall(prose) if "://" not in each and not each.startswith("#")]
    missing = [each for each in targets if not (ROOT / name).parent.joinpath(each.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("name", texts())
def test_every_path_of_the_tree_exists(name: str) -> None:
    folders = {each.partition("/")[0] for each in tracked() if "/" in each}
    paths = {f"/{each}" for each in tracked()}
    missing = []
    for code in inline(name):
        for path in expanded(code):
            if re.fullmatch(r"[\w./*-]+\.(py|proto)", path):  # may leave out the folders of its room
                found = any(fnmatch(each, f"*/{path}") for each in paths)
            elif re.fullmatch(r"[\w.-]+/[\w./*-]*", path) and path.partition("/")[0] in folders:
                found = any(
                    fnmatch(each, f"/{path.rstrip('/')}") or each.startswith(f"/{path.rstrip('/')}/")
                    for each in paths
                )
            else:
                continue
            if not found:
                missing.append(path)
    assert not missing


def test_the_architecture_has_every_room_of_the_import_rules() -> None:
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = [layer for each in contracts if each["type"] == "layers" for layer in each["layers"]]
    rooms = {room.strip().rpartition(".")[2] for layer in layers for room in re.split(r"[|:]", layer)}
    assert not rooms - set(re.findall(r"\w+", read("ARCHITECTURE.md")))


@pytest.mark.parametrize("name", texts())
def test_every_command_exists(name: str) -> None:
    wrong = [problem for line in command_lines(name) if (problem := problem_of(line))]
    every = [small_models, *(each for program in PROGRAMS.values() for each in commands(program))]
    flags = {option for each in every for option in options(each)} | OTHER_FLAGS
    bare = {re.split("[ ,=]", code)[0] for code in inline(name) if code.startswith("--")}
    assert not wrong
    assert not bare - flags


def test_every_command_in_the_code_exists() -> None:
    named = re.findall(r"`(stillhouse(?:-teacher|-trainer)?(?: [^`\n\"]*)?)`", product_code())
    assert not [problem for line in named if (problem := problem_of(line))]


def test_the_services_word_the_same_option_alike() -> None:
    own = {"--allow-root", "--max-upload-bytes", "--max-calls"}
    teacher, trainer = (
        {each.opts[0]: each.help for each in PROGRAMS[name].params if isinstance(each, click.Option)}
        for name in ("stillhouse-teacher", "stillhouse-trainer")
    )
    for flag in (teacher.keys() & trainer.keys()) - own:
        assert (teacher[flag] or "").split("  [")[0] == (trainer[flag] or "").split("  [")[0], flag


@pytest.mark.parametrize("name", texts())
def test_every_target_of_make_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE))
    lines = [*inline(name), *(line for _, body in fences(name) for line in body.splitlines())]
    named = {match[1] for line in lines if (match := re.match(r"(?:[A-Z]+=\S+ )*make ([a-z0-9-]+)", line))}
    assert not named - targets


@pytest.mark.parametrize("name", texts())
def test_every_run_file_is_a_valid_run(name: str) -> None:
    for language, body in fences(name):
        if language == "yaml" and re.search(r"^student:", body, re.MULTILINE):
            from_proto(parse_run(body.encode(), name).spec)


@pytest.mark.parametrize("name", texts())
def test_every_field_of_a_run_exists(name: str) -> None:
    paths = [
        match[0]
        for code in inline(name)
        if (match := re.match(r"[a-z]+(\[\])?(\.[a-z_]+(\[\])?)+(?=$|:)", code))
    ]
    missing = []
    for path in paths:
        first, *others = re.sub(r"\[\]", "", path).split(".")
        message: Any = RunSpec.DESCRIPTOR
        if first not in message.fields_by_name:
            continue  # the name of something else, such as a file
        for each in (first, *others):
            if message is None or each not in message.fields_by_name:
                missing.append(path)
                break
            message = message.fields_by_name[each].message_type
    assert not missing


@pytest.mark.parametrize("name", texts())
def test_every_name_in_capitals_occurs_in_the_code(name: str) -> None:
    names = {code for code in inline(name) if re.fullmatch(r"[A-Z]{2,}(_[A-Z0-9]+)+", code)}
    flags = {option for program in PROGRAMS.values() for option in options(program)}
    of_flags = {
        f"STILLHOUSE_{who}_{flag[2:].replace('-', '_').upper()}"
        for flag in flags
        for who in ("TEACHER", "TRAINER")
    }
    assert not [each for each in names - of_flags if each not in product_code()]


def test_every_sentence_that_troubleshooting_quotes_is_in_the_code() -> None:
    quotes = re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", read("docs/guides/troubleshooting.md"))
    assert len(quotes) > 20
    unknown = []
    for quote in quotes:
        parts = [
            " ".join(f"(?:{re.escape(word)}|{PLACE})" for word in part.split())
            for part in quote.split("…")
            if part.strip()
        ]
        if not any(re.search(".*".join(parts), each, re.DOTALL) for each in sentences()):
            unknown.append(quote)
    assert not unknown


@pytest.mark.parametrize("name", texts())
def test_every_metric_is_in_the_reference(name: str) -> None:
    known = set(inline("docs/reference/metrics.md"))
    names = {code for code in inline(name) if re.fullmatch(r"(stillhouse_|train/|eval/)[a-z_]+", code)}
    assert not names - known


@pytest.mark.parametrize("name", texts())
def test_every_piece_of_python_names_what_the_package_has(name: str) -> None:
    for language, body in fences(name):
        if language != "python":
            continue
        imports = [node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.ImportFrom)]
        names = [alias.name for node in imports if node.module == "stillhouse" for alias in node.names]
        assert all(hasattr(stillhouse, each) for each in names)


def test_the_site_is_built_and_its_pages_load_nothing_from_other_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?(?:https?:)?//"
    )
    assert len(pages) > 20
    assert not [page.name for page in pages if loads.search(page.read_text(encoding="utf-8"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name: str) -> Iterator[tuple[str, str]]:
    """Language and body of each block of code."""
    for match in _FENCE.finditer(read(name)):
        yield match[2], match[3]


def inline(name: str) -> list[str]:
    """Pieces of code in running text."""
    return _CODE.findall(_FENCE.sub("", read(name)))


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` as `a/b.py` and `a/c.py`."""
    match = re.search(r"\{([\w,]+)\}", path)
    return [path] if match is None else [path.replace(match[0], each) for each in match[1].split(",")]


def command_lines(name: str) -> Iterator[str]:
    """Each command of Stillhouse in a text, without comments, pipes and redirections."""
    lines = inline(name)
    for language, body in fences(name):
        if language in ("", "bash", "yaml"):
            lines += body.replace("\\\n", " ").splitlines()
    for line in lines:
        match = re.match(
            r"[#\s]*(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(stillhouse(?:-teacher|-trainer)?(?: .*)?)$", line
        )
        if match:
            yield re.split(r" [#|>&;]|  ", match[1])[0]


def problem_of(line: str) -> str | None:
    """The first word of a command line that its program does not know."""
    program, *words = shlex.split(line)
    if words and f"{program} {words[0]}" in PROGRAMS:
        program = f"{program} {words.pop(0)}"
    command: click.Command = PROGRAMS[program]
    known = options(command) | {"--help": False}
    is_value = False
    for word in words:
        if word.startswith("-") and word != "-":
            name, _, value = word.partition("=")
            if name not in known:
                return f"{line}: {word}"
            is_value = known[name] and not value
        elif isinstance(command, click.Group) and not is_value and re.fullmatch(r"[a-z-]+", word):
            found = command.get_command(click.Context(command), word)
            if found is None:
                return f"{line}: {word}"
            command = found
            known |= options(command)
        else:
            is_value = False
    return None


def commands(command: click.Command) -> Iterator[click.Command]:
    """A command and all below it."""
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            if found is not None:
                yield from commands(found)


def options(command: click.Command) -> dict[str, bool]:
    """Options of a command, and whether each takes a value."""
    names = {option: each for each in command.params for option in (*each.opts, *each.secondary_opts)}
    flags = {name: each for name, each in names.items() if name.startswith("-")}
    return {name: not getattr(each, "is_flag", False) for name, each in flags.items()}
