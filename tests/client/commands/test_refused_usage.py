"""Options that do not go together, and files that a command cannot use: one sentence with the remedy, and nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stillhouse.client.cli import cli
from stillhouse.client.terminal import prompt_input
from stillhouse.protos.errors import StillhouseError

NOBODY = ("--teacher", "127.0.0.1:1", "--trainer", "127.0.0.1:1")
ROWS = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files of rows and of texts."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(ROWS)
    Path("many.jsonl").write_text(ROWS * 20)
    Path("token-rows.jsonl").write_text('{"token_ids": [1, 2]}\n')
    Path("empty.jsonl").write_text("")
    Path("two.txt").write_text("a\nb\n")
    Path("three.txt").write_text("a\nb\nc\n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("scores.jsonl").write_text('{"id": 1.5, "token_ids": [1]}\n')
    return tmp_path


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [*NOBODY, *arguments], input=stdin)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("eval", "Give TARGET, or --hypotheses and --references."),
        ("eval --hypotheses two.txt", "--hypotheses and --references go together."),
        (
            "eval --hypotheses two.txt --references three.txt",
            "two.txt has 2 lines and three.txt 3; line N of one belongs to line N of the other",
        ),
        (
            "eval --hypotheses two.txt --references two.txt --out two.txt",
            "two.txt is read and would be overwritten. Choose another output.",
        ),
        (
            "eval --hypotheses two.txt --references two.txt --metric accuracy --match choices",
            "--match choices compares likelihoods, which texts have not; use exact, numeric or fields.",
        ),
        ("generate --file latin.txt", "latin.txt is not UTF-8 at byte 3; save it as UTF-8."),
        ("generate --in rows.jsonl --out rows.jsonl", "rows.jsonl is the input, too. Choose another --out."),
        ("generate --in rows.jsonl", "--in FILE needs --out FILE, and excludes PROMPT and --file."),
        (
            "data inspect rows.jsonl --column question",
            '--column expects FIELD=NAME, such as prompt=question; "question" is none.',
        ),
        (
            "data parse --in rows.jsonl --out out.jsonl --no-tags --tag answer",
            "--no-tags excludes --tag and --optional-tag.",
        ),
        (
            "data parse --in rows.jsonl --out out.jsonl --field a",
            "'a' is no field; write NAME:TYPE, with a type of text, int, float, bool, json.",
        ),
        (
            "data parse --in rows.jsonl --out out.jsonl --regex-field a:int=(",
            "the pattern of a is no regular expression",
        ),
        (
            "data mix rows.jsonl rows.jsonl rows.jsonl --out out.jsonl",
            "give the SHARES of 3 pools before them, such as 50:30:20.",
        ),
        (
            "data mix 50:30:20 rows.jsonl rows.jsonl --out out.jsonl",
            "there are 3 shares for 2 pools. Give one share for each.",
        ),
        ("data mix many.jsonl many.jsonl --out many.jsonl", "many.jsonl is read and would be overwritten."),
        (
            "data mix rows.jsonl empty.jsonl --out out.jsonl",
            "empty.jsonl has no rows. Write some, or leave it out.",
        ),
        (
            "data export-prompts --in rows.jsonl --compat --out out.jsonl",
            "--compat needs --out-dir DIR and --stem NAME, and excludes --out.",
        ),
        (
            "data export-prompts --in rows.jsonl --stem a",
            "give --out FILE; --out-dir and --stem belong to --compat.",
        ),
        (
            "data export-prompts --in token-rows.jsonl --out out.jsonl",
            "token-rows.jsonl, row 1, field prompt: is missing: a row has messages, prompt or text",
        ),
        (
            "token create --file t.json --name a --scope infer --expires 12",
            "'12' is not a time such as 30m, 12h, 90d, 4w or never.",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(folder: Path, arguments: str, sentence: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = invoke(*arguments.split())
    assert done.exit_code == 2, done.output
    assert sentence in " ".join(done.output.split())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_text_that_is_too_long_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_input, "MAX_TEXT_BYTES", 3)
    done = invoke("generate", "--file", "two.txt")
    assert (done.exit_code, done.output.strip()) == (2, "Error: two.txt is larger than 3 bytes; split it.")
    assert invoke("generate", stdin="a\nbc").output.strip() == "Error: - is larger than 3 bytes; split it."


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("scores.jsonl", "scores.jsonl:1: id expects text or a whole number, and adapter expects text."),
        ("latin.txt", "latin.txt is not UTF-8; save it as UTF-8."),
        ("nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_sequences_to_score_are_refused_with_their_place(folder: Path, file: str, sentence: str) -> None:
    with pytest.raises(StillhouseError, match=re.escape(sentence)):
        list(prompt_input.score_items(str(folder / file), ""))


def test_a_batch_goes_on_in_files_of_its_own_alone(folder: Path) -> None:
    """A journal of another program, and an output that was shortened, are no places to resume from."""
    from stillhouse.client.batch.journal import Header, Journal, JournalState, Position
    from stillhouse.client.batch.ordered_output import Output, OutputPaths

    paths = OutputPaths(out=folder / "out.jsonl")
    header = Header(settings={}, teacher={}, started_s=1)
    paths.journal.write_text(json.dumps({"stillhouse_batch": 99}) + "\n")
    with pytest.raises(StillhouseError, match="is not a journal of this version of Stillhouse"):
        Output(paths, header, overwrite=False, has_failed_file=False)
    Journal.create(paths.journal, header, JournalState(position=Position(rows=2, out_bytes=20))).close()
    paths.out.write_text(json.dumps({"id": 1}) + "\n")
    with pytest.raises(StillhouseError, match=r"has 10 bytes; 20 were written\. Restore the file"):
        Output(paths, header, overwrite=False, has_failed_file=False)
