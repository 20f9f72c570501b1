"""Rows of prompt and completion that every machine has: documented functions of Python's standard library, or a file's rows.

A prompt is a function's head with its docstring, a completion is its body. Rows have a natural spread of lengths.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LEAST_CHARACTERS, MOST_PROMPT_CHARACTERS = 300, 500
"""Shorter functions are left out, so that padding takes about the share that it takes with grade-school questions."""
LEAST_COMPLETION_CHARACTERS = 20
LEFT_OUT = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3"})
FIELDS = (("prompt", "completion"), ("question", "answer"))
"""Names of a file's fields."""


class Pair(NamedTuple):
    """A row."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The row as one text."""
        return self.prompt + self.completion


class Library(NamedTuple):
    """The standard library's functions: rows, and the texts of the others, which a tokenizer and a teacher learn from too."""

    pairs: list[Pair]
    others: list[str]


def standard_library(folder: Path | None = None) -> Library:
    """Reads the functions of Python's own library, or of the modules of a folder, in the order of their files."""
    pairs: dict[Pair, None] = {}
    others: dict[str, None] = {}
    root = folder or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.intersection(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            functions = list(_functions(source))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for pair in functions:
            is_row = (
                len(pair.text) >= LEAST_CHARACTERS
                and 0 < len(pair.prompt) <= MOST_PROMPT_CHARACTERS
                and len(pair.completion.strip()) >= LEAST_COMPLETION_CHARACTERS
            )
            if is_row:
                pairs[pair] = None
            else:
                others[pair.text] = None
    return Library(list(pairs), list(others))


def read_pairs(path: Path) -> list[Pair]:
    """The rows of a JSONL file with fields that FIELDS names. Raises ValueError for other rows."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        names = next((each for each in FIELDS if set(each) <= row.keys()), None)
        if names is None:
            raise ValueError(
                f"{path}, line {number} has the fields {sorted(row)}; rows need one of {list(FIELDS)}."
            )
        prompt, completion = (str(row[name]) for name in names)
        found.append(Pair(prompt + "\n", completion))
    return list(dict.fromkeys(found))


def _functions(source: str) -> Iterator[Pair]:
    """Functions as head with docstring and body; without a docstring or a body behind it the prompt is empty."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first, last = node.lineno - 1, node.end_lineno
        if ast.get_docstring(node) is None or len(node.body) < 2:
            yield Pair("", "".join(lines[first:last]))
            continue
        behind = node.body[0].end_lineno
        yield Pair("".join(lines[first:behind]), "".join(lines[behind:last]))
