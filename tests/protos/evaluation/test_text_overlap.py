"""BLEU, chrF and ROUGE are those of sacrebleu's and rouge-score's own command lines."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.evaluation.row_sums import score_texts

REFERENCES = [
    "The cat sat on the mat .",
    "Seven ships, twelve sails: none returned in 1984.",
    "Ångström measured it twice; nobody believed him!",
    "a b c d e",
    "It costs $1,234.50 (plus tax).",
    "Zwei Äpfel und eine Birne liegen im Korb.",
]
HYPOTHESES = [
    "The cat is sitting on the mat .",
    "Seven ships and twelve sails returned in 1984.",
    "Angström measured it twice, and nobody believed him.",
    "",
    "It costs $1234.50 plus tax",
    "Zwei Birnen liegen im Korb.",
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    hypotheses, references = tmp_path / "hypotheses.txt", tmp_path / "references.txt"
    hypotheses.write_text("\n".join(HYPOTHESES) + "\n")
    references.write_text("\n".join(REFERENCES) + "\n")
    return hypotheses, references


def test_bleu_and_chrf_are_those_of_sacrebleus_command_line(files: tuple[Path, Path]) -> None:
    hypotheses, references = files
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sacrebleu",
            str(references),
            "-i",
            str(hypotheses),
            "-m",
            "bleu",
            "chrf",
            "-w",
            "10",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    expected = {each["name"].lower().rstrip("2"): each for each in json.loads(done.stdout)}
    for metric in ("bleu", "chrf"):
        [rows] = score_texts(metric, HYPOTHESES, REFERENCES).values()
        assert rows.value == pytest.approx(expected[metric]["score"], abs=1e-9)
        assert rows.signature == expected[metric]["signature"]


def test_rouge_is_that_of_rouge_scores_command_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    hypotheses, references = files
    out = tmp_path / "rouge.csv"
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "rouge_score.rouge", "--noaggregate"),
            *(f"--target_filepattern={references}", f"--prediction_filepattern={hypotheses}"),
            f"--output_filename={out}",
        ],
        capture_output=True,
        check=True,
        timeout=60,
    )
    with out.open() as file:
        rows = list(csv.DictReader(file))
    scores = score_texts("rouge", HYPOTHESES, REFERENCES)
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        expected = [float(row[f"{kind}-F"]) for row in rows]
        # The command line prints six digits.
        np.testing.assert_allclose(scores[name].sums[:, 0], expected, atol=5e-7)
        assert scores[name].value == pytest.approx(np.mean(expected), abs=5e-7)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_part_of_the_rows_has_the_value_of_those_rows_alone(metric: str) -> None:
    [whole] = score_texts(metric, HYPOTHESES, REFERENCES).values()
    [part] = score_texts(metric, HYPOTHESES[1:4], REFERENCES[1:4]).values()
    assert float(whole.values(whole.sums[1:4].sum(0))) == part.value


def test_an_empty_reference_is_refused_by_its_row() -> None:
    with pytest.raises(StillhouseError, match="row 2 is empty") as raised:
        score_texts("bleu", ["a", "b"], ["a", ""])
    assert raised.value.reason is Reason.DATASET_INVALID
