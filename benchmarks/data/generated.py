"""Rows of real text in any number, and a tokenizer of the usual kind for them."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from random import Random

from tests.support.small_models import make_tokenizer

VOCABULARY = 32_000
ROW_CHARACTERS = 300
"""Mean length of a row; about 94 tokens."""


def read_text() -> str:
    """The sources and docstrings of Python's standard library: prose and code, on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py"))
    return "\n".join(path.read_text(errors="ignore") for path in files)


def tokenizer_in(folder: Path) -> Path:
    """Trains a byte-level BPE tokenizer, unless it is there."""
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(read_text().splitlines(), folder, VOCABULARY)
    return folder


def write_rows(path: Path, num_rows: int, kind: str, seed: int = 0) -> Path:
    """Writes rows of `kind`, "text" or "completion", unless they are there: passages at random places."""
    if path.exists():
        return path
    text, random = read_text(), Random(seed)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        for _ in range(num_rows):
            begin, length = random.randrange(len(text)), round(ROW_CHARACTERS * random.uniform(0.2, 1.8))
            passage = text[begin : begin + length] or "x"
            cut = len(passage) // 3
            row = (
                {"text": passage}
                if kind == "text"
                else {"prompt": passage[:cut] or "x", "completion": passage[cut:] or "x"}
            )
            file.write(json.dumps(row) + "\n")
    temporary.rename(path)
    return path
