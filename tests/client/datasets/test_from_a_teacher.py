"""From training rows to prompts, a teacher's answers, and the training file that is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.client.batch.input_rows import Sampling
from stillhouse.client.batch.pipeline import BatchSettings, generate_file
from stillhouse.client.teacher.teacher import Teacher
from stillhouse.protos.rows.files import check_file
from tests.client.datasets.rows import data, read, write
from tests.support.programs import Program

pytestmark = pytest.mark.model

QUESTIONS = ["Ada has 3 apples.", "It is a mild day.\nWhat now?", "Count to ten."]


def test_a_captured_answer_carries_its_length_and_mean_log_probability(
    hf_teacher: Program, tmp_path: Path
) -> None:
    rows = [
        {"id": f"q{at}", "system": "Be brief.", "prompt": each, "completion": "x"}
        for at, each in enumerate(QUESTIONS)
    ]
    source, prompts = write(tmp_path / "train.jsonl", rows), tmp_path / "prompts.jsonl"
    assert data("export-prompts", "--in", source, "--out", prompts).exit_code == 0
    sampling = {"temperature": 0.7, "max_new_tokens": 6, "seed": 1}
    with Teacher(hf_teacher.target) as teacher:
        generate_file(
            teacher,
            prompts,
            tmp_path / "answers.jsonl",
            BatchSettings(sampling=Sampling(**sampling), capture=tmp_path / "cache", top_k=4),  # type: ignore[arg-type]
        )
        again = [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": each}]
            for each in QUESTIONS
        ]
        direct = {each.prompt_index: each for each in teacher.complete(again, top_k_logprobs=4, **sampling)}
    answers = read(tmp_path / "answers.jsonl")
    for at, row in enumerate(answers):
        (sample,) = row["completions"]
        distributions = direct[at].distributions
        assert distributions is not None
        assert (sample["text"], sample["num_tokens"]) == (direct[at].text, len(direct[at].token_ids))
        assert sample["mean_logprob"] == pytest.approx(float(distributions.target_logprobs.mean()), abs=1e-5)

    parsed, kept = tmp_path / "parsed.jsonl", tmp_path / "kept.jsonl"
    done = data(
        "parse", "--in", tmp_path / "answers.jsonl", "--out", parsed, "--no-tags", "--field", "all:text"
    )
    assert done.exit_code == 0, done.output
    least = sorted(row["completions"][0]["mean_logprob"] for row in answers)[1]
    done = data(
        "filter", "--in", parsed, "--out", kept, "--parse-ok", "--min-mean-logprob", least, "--max-tokens", 6
    )
    assert done.stdout.splitlines() == [f"{kept}: 2 of 3 rows", "  1 dropped: mean_logprob"]
    assert check_file(kept, extra_fields="keep") == 2, "the rows can be trained on as they are"
