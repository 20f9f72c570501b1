"""Rows of prompt and completion of the comparison of times to quality: taken from Python's library, or from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.end_to_end.pairs import LEAST_CHARACTERS, MOST_PROMPT_CHARACTERS, read_pairs, standard_library

DOCUMENTED = '''def documented(number):
    """{doc}"""
    total = 0
    for each in range(number):
        total += each
    return total
'''


def test_a_documented_function_is_cut_behind_its_docstring(tmp_path: Path) -> None:
    source = DOCUMENTED.format(doc="Adds. " * 40)
    (tmp_path / "module.py").write_text(source + "\n\ndef plain():\n    return 1\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    found = standard_library(tmp_path)
    assert [each.text for each in found.pairs] == [source]
    assert found.pairs[0].prompt.endswith('Adds. """\n')
    assert found.pairs[0].completion.startswith("    total = 0\n")
    assert found.others == ["def plain():\n    return 1\n"]


def test_short_functions_and_long_prompts_are_no_rows(tmp_path: Path) -> None:
    short, long = DOCUMENTED.format(doc="Adds."), DOCUMENTED.format(doc="Adds. " * 200)
    (tmp_path / "module.py").write_text(short + "\n\n" + long)
    found = standard_library(tmp_path)
    assert found.pairs == []
    assert set(found.others) == {short, long}


def test_the_library_has_rows_of_many_lengths() -> None:
    pairs = standard_library().pairs
    lengths = sorted(len(each.text) for each in pairs)
    assert len(pairs) > 1500
    assert lengths[0] >= LEAST_CHARACTERS
    assert lengths[len(lengths) * 9 // 10] > 2 * lengths[len(lengths) // 10]
    assert max(len(each.prompt) for each in pairs) <= MOST_PROMPT_CHARACTERS


def test_rows_of_a_file_have_known_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    assert read_pairs(path) == [("1 + 1?\n", "2")]
    path.write_text(json.dumps({"text": "1"}) + "\n")
    with pytest.raises(ValueError, match="line 1 has the fields"):
        read_pairs(path)
