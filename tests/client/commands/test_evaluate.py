"""`stillhouse eval` on files of texts: no service, no torch, and what does not fit together is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stillhouse.client.cli import cli


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["eval", *arguments])


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    hypotheses, references = tmp_path / "hypotheses.txt", tmp_path / "references.txt"
    hypotheses.write_text("the cat sat\n12 apples\n\n")
    references.write_text("the cat sat\n12\nsomething\n")
    return str(hypotheses), str(references)


def test_texts_in_files_are_scored_without_a_service(files: tuple[str, str], tmp_path: Path) -> None:
    hypotheses, references = files
    out = tmp_path / "report.json"
    arguments = ("--hypotheses", hypotheses, "--references", references, "--out", str(out), "--json")
    metrics = ("--metric", "accuracy", "--metric", "chrf", "--match", "numeric")
    done = invoke(*arguments, *metrics)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(out.read_text())
    found = json.loads(done.stdout)["sets"][0]
    assert found["rows"] == 3
    assert found["metrics"]["accuracy"]["after"]["value"] == pytest.approx(1 / 3)
    table = invoke(*arguments[:4])
    assert "nrefs:1|case:mixed" in table.stdout
    assert "rouge_l" in table.stdout


def test_only_line_feeds_end_a_text_as_for_sacrebleu(tmp_path: Path) -> None:
    hypotheses, references = tmp_path / "hypotheses.txt", tmp_path / "references.txt"
    hypotheses.write_bytes("a\rb c d\u2028e\x0bf\r\nsecond text\r\n".encode())
    references.write_bytes(b"a b c d e f\nsecond text")
    done = invoke("--hypotheses", str(hypotheses), "--references", str(references), "--json")
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)["sets"][0]["metrics"]
    for name in ("bleu", "chrf"):
        command = [
            sys.executable,
            "-m",
            "sacrebleu",
            references,
            "-i",
            hypotheses,
            "-m",
            name,
            "-b",
            "-w",
            "9",
        ]
        printed = subprocess.run(
            [str(each) for each in command], capture_output=True, text=True, check=True
        ).stdout
        assert metrics[name]["after"]["value"] == pytest.approx(float(printed), abs=1e-8)


def test_files_need_neither_torch_nor_transformers(files: tuple[str, str]) -> None:
    code = (
        "import sys\nfrom stillhouse.client.cli import cli\n"
        f"cli(['eval', '--hypotheses', {files[0]!r}, '--references', {files[1]!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, timeout=60)


def test_what_does_not_fit_together_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    hypotheses, references = files
    short = tmp_path / "short.txt"
    short.write_text("one line\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("a\n\nb\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    both = ("--hypotheses", hypotheses, "--references")
    for arguments, sentence in (
        ((*both, str(short)), "has 3 lines and"),
        ((*both, str(binary)), "is not UTF-8 (byte 0)"),
        ((*both, str(empty)), f"The reference of {empty}, line 2, is empty"),
        ((*both, references, "--metric", "kl"), "needs a model's distributions"),
        ((*both, references, "--metric", "accuracy", "--match", "choices"), "compares likelihoods"),
        (
            (*both, references, "--temperature", "0", "--top-p", "0"),
            "--temperature, --top-p belongs to a TARGET",
        ),
        (("--hypotheses", hypotheses), "go together"),
        ((), "Give TARGET"),
        (("a-run", "--references", references), "TARGET writes its own texts"),
        ((*both, references, "--out", references), "would be overwritten"),
        ((*both, references, "--limit", "1", "--top-p", "0.5"), "--limit, --top-p belongs to a TARGET"),
        (
            (*both, str(empty), "--metric", "accuracy", "--match", "numeric"),
            f"that of {empty}, line 1. Correct",
        ),
        ((*both, references, "--metric", "accuracy", "--match", "fields"), "No reference has a JSON object"),
        (("a-run", "--set", "x.jsonl"), "has no name; write --set NAME=FILE"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, arguments
        assert sentence in done.output, done.output


def test_an_address_needs_the_name_of_a_tokenizer() -> None:
    done = invoke("127.0.0.1:1", "--data", "rows.jsonl")
    assert done.exit_code == 2
    assert "127.0.0.1:1 is the address of a served teacher; name a model" in done.stderr
